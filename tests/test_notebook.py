"""The notebook in examples/ runs from its first cell to its last."""

from __future__ import annotations

import os

import helpers
import pytest

NOTEBOOK = helpers.PROJECT / "examples" / "compare_methods.ipynb"


def test_it_is_stored_without_outputs():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[dev]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[dev]'")
    import nbformat

    for name, value in helpers.child_environment(OUT=str(tmp_path)).items():
        monkeypatch.setitem(os.environ, name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    for method in ("full_rank", "galore", "muon"):
        assert any(f"{method} " in text and "perplexity" in text for text in texts)
    assert any("already finished" in text for text in texts)
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    assert (tmp_path / "report" / "report.html").is_file()
