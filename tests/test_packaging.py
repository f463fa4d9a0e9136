"""The wheel: what is in it, and that it installs and runs outside the project's folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import helpers
import pytest

from peft_pretraining.config import shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="pyproject.toml is read with Python 3.11's tomllib")

PYPROJECT = tomllib.loads((helpers.PROJECT / "pyproject.toml").read_text())
COMMANDS = PYPROJECT["project"]["scripts"]
SHAPES = sorted(path.name for path in (helpers.PROJECT / "configs").glob("*.json"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_function(command):
    module, _, name = COMMANDS[command].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_extras_are_those_that_are_documented():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {"zstd", "fused", "flash-attn", "docs", "dev", "completion"} <= set(extras)
    # Of one package two versions must not be asked for.
    tried = re.findall(r"^([\w-]+)", (helpers.PROJECT / "docs" / "requirements.txt").read_text(), re.MULTILINE)
    assert {re.match(r"[\w-]+", item)[0] for item in extras["docs"]} == set(tried)


def test_the_dockerfile_copies_what_the_package_is_made_of():
    text = (helpers.PROJECT / "Dockerfile").read_text().replace("\\\n", " ")
    copied = {word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]}
    needed = {"pyproject.toml", PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]}
    needed |= {"requirements.txt", "configs", "peft_pretraining", *(f"{name}.py" for name in modules())}
    assert copied == needed and all((helpers.PROJECT / name).exists() for name in copied)
    assert {"ARG BASE=", "ARG TORCH_INDEX=", "ARG EXTRAS="} <= set(re.findall(r"^ARG \w+=", text, re.MULTILINE))


@pytest.mark.parametrize("spelling", ["llama_60m", "llama_60m.json", "configs/llama_60m.json"])
def test_a_shape_is_found_from_any_folder(spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.shape(spelling) == str(helpers.PROJECT / "configs" / "llama_60m.json")
    Path("configs").mkdir()
    for own in ("llama_60m", "llama_60m.json", "configs/llama_60m.json"):
        Path(own).touch()
    assert shipped.shape(spelling) == spelling


@pytest.mark.parametrize("spelling", ["nowhere", "other/llama_60m.json", "/configs/llama_60m.json", "../configs/a"])
def test_no_other_name_becomes_a_shape(spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.shape(spelling) == spelling


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy, so that the project's folder stays as it is, with what is installed here."""
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", *(f"{name}.py" for name in modules())):
        shutil.copy(helpers.PROJECT / name, source)
    shutil.copytree(helpers.PROJECT / "configs", source / "configs")
    shutil.copytree(
        helpers.PROJECT / "peft_pretraining",
        source / "peft_pretraining",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    if all(importlib.util.find_spec(name) for name in ("build", "twine")):
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=250)
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, out.iterdir())], check=True)
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
        subprocess.run([*command, str(source)], check=True, capture_output=True, timeout=250)
    (built,) = out.glob("*.whl")
    return built


def modules() -> list[str]:
    return PYPROJECT["tool"]["setuptools"]["py-modules"]


@pytest.mark.slow
def test_the_wheel_has_code_shapes_and_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = helpers.PROJECT / "peft_pretraining"
    files = [path for pattern in ("*.py", "*.css", "*.js") for path in package.rglob(pattern)] + [package / "py.typed"]
    expected = {path.relative_to(helpers.PROJECT).as_posix() for path in files}
    for pattern in ("*.json", "recipes/*.yaml", "studies/*.yaml"):
        found = (helpers.PROJECT / "configs").glob(pattern)
        expected |= {f"peft_pretraining/{path.relative_to(helpers.PROJECT).as_posix()}" for path in found}
    expected |= {f"{name}.py" for name in modules()}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_in_a_fresh_environment_outside_the_project(wheel, tmp_path):
    """A corpus to tokens, a short run, a report, an export, a text: with what the wheel has, and its dependencies."""
    fresh = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(fresh / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    # The dependencies of this environment, without its own installation of the project.
    folder = next((fresh / "lib").glob("python*/site-packages"))
    found = [path for path in sys.path if path.endswith("site-packages")]
    (folder / "dependencies.pth").write_text("\n".join(found) + "\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    work = tmp_path / "work"
    work.mkdir()

    def call(name: str, *argv: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(fresh / "bin" / name), *map(str, argv)]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == code, done.stderr
        return done

    where = call(
        "python", "-c", "import peft_pretraining, torchrun_main as t; print(peft_pretraining.__file__, t.__file__)"
    )
    assert all(path.startswith(str(folder)) for path in where.stdout.split())
    for command, description in (("peft-pretrain", "Pre-train a LLaMA"), ("peft-pretokenize", "Tokenise a corpus")):
        assert (told := call(command, "--help").stdout).startswith(f"usage: {command} ") and description in told
    words = "the old town lies on the left bank of the river and its church was built long ago".split()
    (work / "corpus.txt").write_text(
        "\n\n".join(" ".join(words[start:] + words) for start in range(len(words)) for _ in "abc")
    )
    tokens = "--dataset corpus.txt --train_tokenizer 300 --sequence_length 32 --save_dir data --num_cpu 1"
    data = call("peft-pretokenize", *tokens.split()).stdout.splitlines()[-1]
    flags = (
        "--method lora --rank 4 --batch_size 2 --total_batch_size 2 --num_training_steps 3 --warmup_steps 1 --lr 0.01"
    )
    flags += " --model_config llama_tiny --save_dir run --save_every 3 --eval_every 3 --workers 0 --autoresume True"
    call("peft-pretrain", *flags.split(), "--dataset_path", data)
    assert call("peft-report", "run", "--out", "report").stdout == "report/report.html\n"
    assert "lora" in (work / "report" / "report.md").read_text()
    assert call("peft-export", "run", "exported").stdout == "exported\n"
    assert call("peft-generate", "exported", "the old town", "--max_new_tokens", 3).stdout.startswith("the old town")
    planned = call("peft-recipe", "60m", "galore", "--dry_run", "--nproc", 2).stdout
    assert (
        f"{folder / 'torchrun_main.py'} --model_config {folder / 'peft_pretraining/configs/llama_60m.json'}" in planned
    )
    launched = call("peft-torchrun", "--standalone", "--nproc_per_node", 2, "-m", "torchrun_main", "--lr", "x", code=2)
    assert {line.split(":")[0] for line in launched.stderr.splitlines() if line} <= {"error", "warning"}
