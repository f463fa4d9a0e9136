"""Every entry point from a checkout that is not installed, from another folder, without torch until it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import helpers
import pytest

LIGHT = (
    *("torchrun_main.py", "pretokenize.py", "experiments/non_convergence.py"),
    *(f"scripts/{name}.py" for name in ("study", "sweep", "compare", "launch")),
    *(f"scripts/{name}.py" for name in ("fetch_corpus", "export_merged", "architecture", "generate_docs", "check_gpu")),
)
HEAVY = ("run_glue.py", "run_tasks.py")
_SCRIPT = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0], sys.path[0] = script, script.rpartition("/")[0]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stopped:
    code = stopped.code
heavy = sorted({"torch", "transformers", "datasets", "matplotlib", "wandb"} & set(sys.modules))
print("ENDED", code, *heavy)
"""


def run(script: str, *argv: str, cwd: Path) -> tuple[str, str]:
    """The last line on stdout, and stderr, of a script where the project itself is not importable."""
    # Without -S, an editable installation would be found through its .pth file.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-S", "-c", _SCRIPT, str(helpers.PROJECT / script), *argv]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout.rstrip().rpartition("\n")[2], done.stderr


def test_the_package_is_not_importable_there(tmp_path):
    (tmp_path / "script.py").write_text("import peft_pretraining")
    assert "No module named 'peft_pretraining'" in run(str(tmp_path / "script.py"), cwd=tmp_path)[1]


def test_every_entry_point_is_tried():
    scripts = [path for folder in (".", "scripts", "experiments") for path in (helpers.PROJECT / folder).glob("*.py")]
    entries = {str(path.relative_to(helpers.PROJECT)) for path in scripts if "__main__" in path.read_text()}
    assert entries == {*LIGHT, *HEAVY}


@pytest.mark.parametrize("script", LIGHT)
def test_help_from_a_checkout(script, tmp_path):
    assert run(script, "--help", cwd=tmp_path) == ("ENDED 0", "")


@pytest.mark.slow
@pytest.mark.parametrize("script", HEAVY)
def test_help_of_what_reads_transformers_flags(script, tmp_path):
    ended, errors = run(script, "--help", cwd=tmp_path)
    assert ended.startswith("ENDED 0"), errors


@pytest.mark.parametrize("script", [script for script in LIGHT if script != "scripts/architecture.py"])
def test_a_bad_flag_is_refused_without_torch(script, tmp_path):
    ended, errors = run(script, "--nonsense", cwd=tmp_path)
    assert ended == "ENDED 2" and "error: " in errors.splitlines()[-1] and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ("torchrun_main", *(name.removesuffix(".py") for name in HEAVY)))
def test_methods_are_read_where_errors_become_lines(script):
    """And not while the script is imported: one wrong folder would end every command in a traceback."""
    code = f"import sys, {script}; assert 'peft_pretraining.methods.registry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=helpers.PROJECT, check=True)


_TELLS = """
import os, runpy, sys
script, sys.argv, sys.path[0] = sys.argv[1], sys.argv[1:], sys.argv[1].rpartition("/")[0]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit:
    told = [f"{key}={value}" for key, value in sorted(os.environ.items()) if "ALLOC_CONF" in key]
    print(*told, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "PYTORCH_ALLOC_CONF=expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": ""}, "PYTORCH_ALLOC_CONF="),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64"),
    ],
    ids=["nothing", "new name", "older name"],
)
def test_cudas_allocator_is_told_before_torch_is_imported_unless_the_user_has(given, told):
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    command = [sys.executable, "-c", _TELLS, str(helpers.PROJECT / "torchrun_main.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == f"{told} False", done.stderr


@pytest.mark.parametrize("script", ["torchrun_main.py", *HEAVY])
def test_what_trains_goes_through_run_script(script):
    """Which tells the allocator, and answers signals."""
    assert "sys.exit(run_script(main))" in (helpers.PROJECT / script).read_text()
