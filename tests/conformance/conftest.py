"""The choice of one method, and the runs that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.runs import Case, Runs
from peft_pretraining.methods import METHODS

FOLDER = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--method", metavar="NAME", help="tests/conformance: of this method alone")


def chosen(config: pytest.Config) -> str | None:
    """The method that was named; the option is not there where pytest was started from a folder above."""
    return config.getoption("--method", default=None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    method = chosen(config)
    if method is None:
        leave_to_the_slow_tier(items)
        return
    if method not in METHODS:
        raise pytest.UsageError(f"--method {method}: there is {', '.join(METHODS)}")
    kept = [item for item in items if _method_of(item) in (None, method)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def leave_to_the_slow_tier(items: list[pytest.Item]) -> None:
    """Of methods that others stand for, all but what is refused, which runs nothing. A method that is named is run."""
    for item in items:
        case = _case_of(item)
        if case and not case.is_representative and item.path.parent == FOLDER and item.path.stem != "test_refusals":
            item.add_marker(pytest.mark.slow)


def _method_of(item: pytest.Item) -> str | None:
    """None for tests of other folders, and of the suite itself."""
    return getattr(_case_of(item), "method", None)


def _case_of(item: pytest.Item) -> Case | None:
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return case if isinstance(case, Case) else None


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("conformance"))
