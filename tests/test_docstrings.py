"""The examples in docstrings: what they show is what comes out."""

import doctest
import importlib

import pytest

from scripts import architecture

PACKAGE = architecture.PROJECT / "peft_pretraining"
MODULES = sorted(
    ".".join(path.relative_to(architecture.PROJECT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    "name",
    ["GoLore", "data.blocks", "models.loading", "nn.low_rank_linear", "report.compare", "checkpoint.folder_lock"],
)
def test_what_others_call_has_an_example(name):
    assert f"peft_pretraining.{name}" in MODULES
