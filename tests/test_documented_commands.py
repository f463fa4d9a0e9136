"""Every command that README and docs show is executed by a test, or said to need a cluster; none has a stale flag."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import documented
import helpers
import pytest
from conftest import write_blocks, write_model

import pretokenize
from peft_pretraining.config import cli, foreign_names
from peft_pretraining.data.tokenizer import train_tokenizer
from peft_pretraining.finetune import glue_settings
from peft_pretraining.finetune.command_line import finetuning_flags
from peft_pretraining.finetune.options import settings as option_settings
from peft_pretraining.flags.reading import read_flags
from peft_pretraining.launching import launch

BLOCKS = documented.blocks()
FLAGS = {
    "torchrun_main.py": cli.all_flags(),
    "pretokenize.py": [*pretokenize.FLAGS, *(flag for flag in cli.all_flags() if flag.name == "training_config")],
    "run_glue.py": finetuning_flags(glue_settings.ENTRY),
    "run_tasks.py": finetuning_flags(option_settings.ENTRY),
}
ELSEWHERE = {"pip", "docker", "lm_eval", "register-python-argcomplete", "eval", "id", "cp", "cd", "mv", "cat"}
"""Programs of others."""
PLACEHOLDERS = {"...", "FLAGS"}


def unmarked(text: str) -> str:
    """A word without the brackets of what may be left out."""
    return text.removeprefix("[").removesuffix("]")


def problems_of(command: list[str]) -> list[str]:
    """What the programs that a command starts would refuse of its words."""
    words = [unmarked(word) for word in command if word not in PLACEHOLDERS]
    if words[0] in ELSEWHERE:
        return []
    if words[:2] == ["python", "-m"] and words[2] != "pytest":
        words = words[2:]
    at = next((i for i, word in enumerate(words) if word.endswith((".py", ".sh")) or "peft_pretraining." in word), None)
    if at is None:
        return [] if words[:3] == ["python", "-m", "pytest"] else [f"no program in {words}"]
    program, rest = words[at], words[at + 1 :]
    if "--help" in rest:
        rest = []
    if program in FLAGS:
        problems: list[str] = []
        hints = foreign_names.HINTS if program == "torchrun_main.py" else None
        read_flags(FLAGS[program], rest, prog=program, description="", problems=problems, warnings=[], hints=hints)
        return problems
    if program.startswith("llama.cpp/"):
        return []
    path = found(program)
    if path is None:
        return [f"{program} does not exist"]
    if "pretrain.sh" in program:
        return [] if launch.main([*rest, "--dry_run", "--save_dir", "unused"]) == 0 else [f"{program} refuses {rest}"]
    given = {word.partition("=")[0] for word in before_overrides(rest) if word.startswith("--")}
    source = "".join(file.read_text() for file in sources(path))
    if program == "peft_pretraining.report.plan":
        given -= {f"--{flag.name}" for flag in FLAGS["torchrun_main.py"]}
    return [f"{program} has no {flag}" for flag in sorted(given) if not re.search(rf"{flag}\b", source)]


def before_overrides(words: list[str]) -> list[str]:
    return words[: words.index("--")] if "--" in words else words


def found(program: str) -> Path | None:
    if program.startswith("peft_pretraining."):
        spec = importlib.util.find_spec(program)
        return Path(spec.origin) if spec and spec.origin else None
    path = helpers.PROJECT / program
    return path if path.is_file() else None


def sources(path: Path) -> list[Path]:
    """Where a program may read its flags: its own file, those beside it, and what shell scripts hand them to."""
    if path.suffix == ".sh" or "benchmarks" in path.parts or "scripts" in path.parts:
        whole = helpers.PROJECT / "peft_pretraining"
        return [path, *path.parent.rglob("*.py"), *(whole.rglob("*.py") if path.suffix == ".sh" else ())]
    return [path, *path.parent.rglob("*.py")]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_programs_know_what_is_shown_of_them(block, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    problems = [problem for command in block.commands() for problem in problems_of(command)]
    assert not problems, capsys.readouterr().err


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_block_says_what_executes_it(block):
    assert block.mark, f"{block}: one of the comments of tests/documented.py belongs on the line above"
    if block.mark == "cluster":
        assert block.note, f"{block}: why?"
    if block.mark == "tested by":
        text = (helpers.PROJECT / block.note).read_text()
        words = [word for command in block.commands() for word in command]
        names = {Path(word).name for word in words if re.search("[._-]", word.lstrip("-"))}
        assert any(name.removesuffix(".py") in text for name in names), f"{block.note} has none of {sorted(names)}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like the project's, with runs of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in helpers.PROJECT.iterdir():
        if path.name not in (".git", ".venv", "scripts", "quickstart", "checkpoints"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(helpers.PROJECT / "scripts", folder / "scripts")
    (folder / "scripts" / "install.sh").write_text("exit 0\n")  # what it would install runs this test
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def in_shell(checkout: Path, script: str, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env=helpers.child_environment(PATH=path, **environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_compares_two_methods(checkout):
    """With fewer updates and documents, and again where it was."""
    sources = [*(helpers.PROJECT / "docs").rglob("*.md"), *(helpers.PROJECT / "peft_pretraining").rglob("*.py")]
    texts = [text for path in sorted(sources) for text in path.read_text().split("\n\n") if text.strip()]
    corpus = checkout / "quickstart" / "wiki_intros.jsonl"
    corpus.parent.mkdir()
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for _ in range(2):
        shown = in_shell(checkout, "bash scripts/quickstart.sh", QUICKSTART_UPDATES="6")
        assert re.search(r"\| full_rank +\| +\d+\.\d+ \|", shown) and re.search(r"\| galore +\| +\d+\.\d+ \|", shown)
        assert (checkout / "quickstart" / "comparison.png").stat().st_size > 5000


RUN = [
    page
    for page in dict.fromkeys(block.page for block in BLOCKS)
    if any(b.mark == "run" for b in BLOCKS if b.page == page)
]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_that_are_shown_run(checkout, page):
    """In the order of their page, on small runs under the names that it has for them."""
    data, model = checkout / "blocks", write_model(checkout / "small.json", vocab_size=300)
    write_blocks(data)
    text = "the old town lay by the river, and the river ran by the old town. " * 20
    train_tokenizer([text], 280, 1).save_pretrained(data)
    for name, own in (("my_run", []), ("my_lora_run", ["--method", "lora", "--rank", 2])):
        argv = ["--model_config", model, "--dataset_path", data, "--save_dir", checkout / "checkpoints" / name, *own]
        argv += ["--batch_size", 2, "--num_training_steps", 2, "--warmup_steps", 0, "--lr", 0.01, "--save_every", 2]
        assert helpers.run([*argv, "--eval_every", 2, "--workers", 0]) == 0
    for block in BLOCKS:
        if block.page == page and block.mark == "run":
            in_shell(checkout, block.text.replace("model_20000", "model_2"))
