"""The choice of one method, and the runs that the tests share."""

from __future__ import annotations

import pytest

from conformance.runs import Runs
from peft_pretraining.methods import METHODS


def pytest_addoption(parser):
    parser.addoption("--method", metavar="NAME", help="tests/conformance: of this method alone")


def chosen(config: pytest.Config) -> str | None:
    """The method that was named; the option is not there where pytest was started from a folder above."""
    return config.getoption("--method", default=None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    method = chosen(config)
    if method is None:
        return
    if method not in METHODS:
        raise pytest.UsageError(f"--method {method}: there is {', '.join(METHODS)}")
    kept = [item for item in items if _method_of(item) in (None, method)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _method_of(item: pytest.Item) -> str | None:
    """None for tests of other folders, and of the suite itself."""
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return getattr(case, "method", None)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("conformance"))
