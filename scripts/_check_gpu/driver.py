"""One step after the other, each in its own processes; the table, the file and the exit code."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# Forks then have what takes long to import.
import peft_pretraining.training.build  # noqa: F401
import torchrun_main  # noqa: F401

from .children import Child
from .lines import ABSENT, FAILED, OK, Line, Lines, read, table
from .plan import STEPS, Step
from .scene import Scene, prepare


def run(device: str, quick: bool, chosen: Sequence[str], file: Path, seconds: float) -> int:
    began = time.monotonic()
    lines: list[Line] = []
    logs: dict[str, str] = {}
    # No TemporaryDirectory: a fork that calls what is to be called at the end would remove it.
    shared = Path(tempfile.mkdtemp(prefix="check_gpu"))
    try:
        devices, problem = _devices(device, shared)
        if not problem:
            made = Child.start(lambda: prepare(shared, quick), shared / "data.log")
            if not made.wait(120) or made.code:
                problem = f"the data cannot be written: {made.last_words()}"
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            return 2
        name = f"{device}:0" if device == "cuda" else device
        for step in STEPS:
            if step.name not in chosen or (quick and not step.quick):
                continue
            left = began + seconds - time.monotonic()
            new = _perform(step, Scene(torch.device(name), quick, shared, shared), devices, left, logs)
            lines += new
            _say(new)
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    _write(file, device, quick, lines, logs, time.monotonic() - began)
    print()
    print(table(lines))
    print(f"\n{time.monotonic() - began:.0f} s; also in {file}")
    failed = [line for line in lines if line.verdict == FAILED]
    for line in failed:
        print(f"FAILED {line.step}: {line.what}: {line.seen}" + (f" (limit {line.limit})" if line.limit else ""))
    return 1 if failed else 0


def _perform(step: Step, scene: Scene, devices: int, left: float, logs: dict[str, str]) -> list[Line]:
    title = f"{step.name} {step.case}".strip()
    if devices < step.devices:
        return [Line(step.name, step.case or step.name, f"{devices} device(s)", "", ABSENT, 0.0)]
    if left <= 0:
        return [Line(step.name, step.case or step.name, "no time was left", "", FAILED, 0.0)]
    folder = scene.shared / title.replace(" ", "_").replace(",", "")
    folder.mkdir()
    file, began = folder / "lines.jsonl", time.monotonic()
    scene = dataclasses.replace(scene, folder=folder)
    act = _function(step)
    child = Child.start(lambda: act(scene, Lines(step.name, file), step.case), folder / "log")
    in_time = child.wait(min(step.seconds, left))
    lines, seconds = read(file), round(time.monotonic() - began, 2)
    if not in_time:
        lines.append(Line(step.name, title, f"no end after {seconds:.0f} s", "", FAILED, seconds))
    elif child.code:
        why = child.last_words() or f"ended with {child.code}"
        why = f"signal {-child.code}: {why}" if child.code < 0 else why
        lines.append(Line(step.name, title, " ".join(why.split())[:200], "", FAILED, seconds))
    if any(line.verdict == FAILED for line in lines):
        logs[title] = child.last_words(40)
    shutil.rmtree(folder, ignore_errors=True)
    return lines


def _function(step: Step) -> Callable[[Scene, Lines, str], None]:
    module, _, name = step.function.partition(".")
    return getattr(importlib.import_module(f"_check_gpu.steps.{module}"), name)


def _devices(device: str, shared: Path) -> tuple[int, str]:
    """How many there are, and why none can be used: asked in a fork, as an answer may make a context."""
    if device == "cpu":
        return 1, ""
    found = shared / "devices"

    def ask() -> None:
        if not torch.cuda.is_available():
            raise SystemExit(_say_why("torch finds no CUDA device that it can use"))
        for index in range(torch.cuda.device_count()):
            torch.ones(1, device=f"cuda:{index}").item()
        found.write_text(str(torch.cuda.device_count()))

    child = Child.start(ask, shared / "devices.log")
    if not child.wait(60):
        return 0, "the GPU does not answer within 60 s"
    if child.code:
        lines = child.last_words(40).splitlines()
        errors = [line for line in lines if "Error" in line or "error" in line]
        return 0, f"{(errors or lines or ['the GPU cannot be used'])[0]} (--device cpu tries the code without one)"
    return int(found.read_text()), ""


def _say_why(problem: str) -> int:
    print(problem)
    return 1


def _say(lines: Sequence[Line]) -> None:
    """Progress, on stderr."""
    for line in lines:
        mark = "" if line.verdict == OK else f" {line.verdict}"
        print(f"{line.step}: {line.what}: {line.seen}{mark}", file=sys.stderr, flush=True)


def _write(file: Path, device: str, quick: bool, lines: list[Line], logs: dict[str, str], seconds: float) -> None:
    described = {
        "device": device,
        "quick": quick,
        "seconds": round(seconds, 1),
        "failed": sum(line.verdict == FAILED for line in lines),
        "lines": [dataclasses.asdict(line) for line in lines],
        "logs": logs,
    }
    file.write_text(json.dumps(described, indent=2) + "\n")
