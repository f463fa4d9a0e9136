"""scripts/check_gpu.sh on the CPU: its lines, what fails, and that a step that crashes ends nothing but itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

from scripts._check_gpu import lines, plan

SCRIPTS = helpers.PROJECT / "scripts"

_BROKEN = """
import ctypes, os, sys, time, types
sys.path.insert(0, {scripts!r})
import check_gpu
from _check_gpu import driver
from _check_gpu.plan import STEPS, Step

def raises(scene, lines, case):
    lines.at_most("before the error", 1, 2, "GiB")
    raise RuntimeError("CUDA error: an illegal memory access\\nwas encountered")

def crashes(scene, lines, case):
    ctypes.string_at(0)

def hangs(scene, lines, case):
    time.sleep(100)

def fails(scene, lines, case):
    lines.at_most("a peak", 2.5, 2, "GiB")
    lines.at_least("a speed", float("nan"), 2)
    lines.absent("a compiled one", "this version has none")

sys.modules["_check_gpu.steps.broken"] = types.SimpleNamespace(**globals())
kept = [step for step in STEPS if step.name == "settings"]
broken = [Step(name, f"broken.{{name}}", 1.0 if name == "hangs" else 30.0)
          for name in ("raises", "crashes", "hangs", "fails")]
driver.STEPS = (*broken, *kept, Step("more", "broken.fails", 30.0, devices=2))
check_gpu._NAMES[:] = [step.name for step in driver.STEPS]
sys.exit(check_gpu.main(["--device", "cpu", "--quick", "--json", {file!r}]))
"""


def ended(command: list[str], file: Path, timeout: float = 280) -> tuple[subprocess.CompletedProcess, dict]:
    done = subprocess.run(
        command, env=helpers.child_environment(), capture_output=True, text=True, timeout=timeout, cwd=file.parent
    )
    assert file.exists(), done.stderr
    return done, json.loads(file.read_text())


@pytest.mark.slow
def test_a_step_that_crashes_is_a_line_and_the_others_go_on(tmp_path):
    file = tmp_path / "lines.json"
    script = _BROKEN.format(scripts=str(SCRIPTS), file=str(file))
    done, found = ended([sys.executable, "-c", script], file)
    verdicts = [(line["step"], line["what"], line["verdict"]) for line in found["lines"]]
    trained = [each for each in verdicts if each[0] == "settings"]
    assert [each for each in verdicts if each[0] != "settings"] == [
        ("raises", "before the error", "ok"),
        ("raises", "raises", "FAILED"),
        ("crashes", "crashes", "FAILED"),
        ("hangs", "hangs", "FAILED"),
        ("fails", "a peak", "FAILED"),
        ("fails", "a speed", "FAILED"),
        ("fails", "a compiled one", "not available"),
        ("more", "more", "not available"),
    ]
    assert [each[2] for each in trained] == ["ok"] * 3
    seen = {line["what"]: line["seen"] for line in found["lines"]}
    assert seen["raises"].endswith("was encountered") and seen["crashes"].startswith("signal 11: ")
    assert seen["hangs"].startswith("no end after ")
    assert done.returncode == 1 and found["failed"] == 5
    assert done.stdout.splitlines()[-5:-1] == [
        f"FAILED raises: raises: {seen['raises']}",
        f"FAILED crashes: crashes: {seen['crashes']}",
        f"FAILED hangs: hangs: {seen['hangs']}",
        "FAILED fails: a peak: 2.5 GiB (limit <= 2 GiB)",
    ]
    assert set(found["logs"]) == {"raises", "crashes", "hangs", "fails"}


@pytest.mark.slow
def test_every_step_with_tiny_shapes(tmp_path):
    file = tmp_path / "lines.json"
    command = ["bash", str(SCRIPTS / "check_gpu.sh"), "--device", "cpu", "--quick", "--json", str(file)]
    done, found = ended(command, file)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {line["verdict"] for line in found["lines"]} == {"ok", "not available"}
    tried = [line["step"] for line in found["lines"] if line["verdict"] == "ok"]
    assert list(dict.fromkeys(tried)) == list(dict.fromkeys(step.name for step in plan.STEPS if step.quick))


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    environment = helpers.child_environment(CUDA_VISIBLE_DEVICES="")
    command = ["bash", str(SCRIPTS / "check_gpu.sh"), "--json", str(tmp_path / "lines.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not (tmp_path / "lines.json").exists()
    assert done.stderr.splitlines()[-1].startswith("error: torch finds no CUDA device that it can use (")


def test_bad_input(tmp_path):
    command = [sys.executable, str(SCRIPTS / "check_gpu.py"), "--only", "versions,speeds"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--only speeds: there is versions, parity, group of one" in done.stderr


@pytest.mark.parametrize(
    "value, unit, text",
    [(0.0, "", "0"), (1e-9, "", "1.0e-09"), (12345.6, "tokens/s", "12,346 tokens/s"), (9.104, "GiB", "9.104 GiB")],
)
def test_numbers(value, unit, text):
    assert lines.shown(value, unit) == text


def test_a_line_that_was_cut_off_is_none(tmp_path):
    written = lines.Lines("step", tmp_path / "lines")
    written.at_least("a ratio", 0.8, 0.75)
    written.reports("no number", float("inf"))
    with (tmp_path / "lines").open("a") as file:
        file.write('{"step": "st')
    assert [(line.seen, line.limit, line.verdict) for line in lines.read(tmp_path / "lines")] == [
        ("0.8", ">= 0.75", "ok"),
        ("inf", "", "FAILED"),
    ]
    rows = lines.table(lines.read(tmp_path / "lines")).splitlines()
    assert len({len(row) for row in rows}) == 1 and len(rows) == 4
