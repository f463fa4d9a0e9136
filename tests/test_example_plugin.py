"""`examples/my_method`, a method in a package of its own: installed, it is one like any other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLE = helpers.PROJECT / "examples" / "my_method"
NAME = "ademamix_example"
COMMAND = "torchrun_main.py"
PIP = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A function that runs Python in the project's folder, with the example installed beside it; returns its output."""
    folder = tmp_path_factory.mktemp("plugin")
    # A copy, because building leaves files in the folder.
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    path = os.pathsep.join(map(str, (folder / "installed", helpers.PROJECT, helpers.PROJECT / "tests")))
    environment = helpers.child_environment(PYTHONPATH=path, PIP_DISABLE_PIP_VERSION_CHECK="1")

    def run(*arguments: str | Path, code: int = 0) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=helpers.PROJECT, capture_output=True, text=True)
        assert done.returncode == code, done.stdout[-20000:] + done.stderr[-10000:]
        return done.stdout + done.stderr

    run(*PIP, "--target", folder / "installed", folder / "source")
    return run


def conformance(python, *arguments: str) -> str:
    """What pytest says of the example's own tests and of those of every method, for the example."""
    folders = ("tests/conformance", EXAMPLE / "tests")
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *folders, "--method", NAME, *arguments)


def test_help_shows_it(python):
    shown = python(COMMAND, "--help", NAME)
    assert "AdEMAMix: AdamW with a second, slow first moment." in shown
    assert "--ademamix_beta3" in shown and "--update_proj_gap" not in shown


def test_what_every_method_must_do_in_one_process(python):
    said = conformance(python, "-m", "not slow", "-k", "learns or resumed or bytes or export or own or paper")
    assert int(re.search(r"(\d+) passed", said)[1]) >= 10


@pytest.mark.slow
def test_what_every_method_must_do(python):
    said = conformance(python)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 25 and "skipped" not in said
    assert "there is full_rank" in python("-m", "pytest", "tests/conformance", "--method", "nonsense", code=4)


@pytest.mark.slow
def test_it_trains_stops_goes_on_and_is_exported(python, command, tmp_path):
    """From the command line, as a user does; in processes that know of the example by its entry point alone."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    argv = {folder: [*command(method=NAME, save_dir=folder), *helpers.RESUME] for folder in (whole, stopped)}
    python(COMMAND, *argv[whole])
    python("-c", "import sys, helpers; helpers.stop_after(7, sys.argv[1:])", *argv[stopped])
    assert helpers.checkpoints(stopped) == [7]
    python(COMMAND, *argv[stopped])
    helpers.assert_same_run(stopped, whole)
    losses = [loss for _, loss in helpers.evaluations(whole)]
    assert losses[-1] < losses[0] - 0.5

    python("scripts/export_merged.py", stopped / "model_20", tmp_path / "exported")
    exported, saved = (
        AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "exported", whole / "model_20")
    )
    for (name, one), other in zip(exported.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_run_of_a_method_that_is_not_installed_is_refused(command, capsys):
    assert helpers.run(command(method=NAME)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if NAME in line]
    assert f"--method '{NAME}' is unknown; there is full_rank" in line
