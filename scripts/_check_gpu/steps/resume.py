"""Runs that are killed or asked to stop, and go on: the same bits as of a run that nothing disturbed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from peft_pretraining.runtime.signals import EXIT_REQUEUE

from ..children import Child
from ..lines import Lines
from ..scene import Scene
from ..trainee import differing, must_end, saved_tensors, settings_of, whole_run

METHODS: dict[str, dict[str, Any]] = {
    "galore": {"method": "galore", "rank": 16, "update_proj_gap": 5},
    "full_rank": {"method": "full_rank"},
    "relora": {"method": "relora", "rank": 16, "relora": 5},
    "switchlora": {"method": "switchlora", "rank": 16, "switch_lora_interval": 5, "adam_warm_step": 2},
    "golore_adapter": {"method": "golore_adapter", "rank": 16, "update_proj_gap": 5, "rand_ratio": 0.5},
}


def killed(scene: Scene, lines: Lines, case: str) -> None:
    """kill -9 after the first checkpoint; all methods at a time, as a device has memory for."""
    chosen = dict(list(METHODS.items())[:1]) if scene.quick else METHODS
    undisturbed = {name: _start(scene, name, "at_once") for name in chosen}
    disturbed = {name: _start(scene, name, "stopped") for name in chosen}
    try:
        for name, child in disturbed.items():
            _wait_for_update(scene.folder / f"{name}_stopped", child, _save_every(scene) + 2)
            child.signal(signal.SIGKILL)
            child.wait(20)
        again = {name: _start(scene, name, "stopped", autoresume=True) for name in chosen}
        for child in (*undisturbed.values(), *again.values()):
            must_end(child, 80)
    finally:
        for child in (*undisturbed.values(), *disturbed.values()):
            child.kill()
    for name in chosen:
        _compare(scene, lines, name, f"{name}: killed in update {_save_every(scene) + 2} or later and resumed")


def terminated(scene: Scene, lines: Lines, case: str) -> None:
    """SIGTERM: the update is finished and saved, the exit code asks for another launch."""
    name = "galore"
    undisturbed, child = _start(scene, name, "at_once"), _start(scene, name, "stopped")
    try:
        _wait_for_update(scene.folder / f"{name}_stopped", child, 4)
        child.signal(signal.SIGTERM)
        ended = child.wait(30)
        lines.holds("SIGTERM: exit code", ended and child.code == EXIT_REQUEUE, str(child.code), str(EXIT_REQUEUE))
        must_end(_start(scene, name, "stopped", autoresume=True), 40)
        must_end(undisturbed, 40)
    finally:
        undisturbed.kill()
        child.kill()
    _compare(scene, lines, name, f"{name}: stopped by SIGTERM and resumed")


def _save_every(scene: Scene) -> int:
    return scene.size(20, 4)


def _start(scene: Scene, name: str, folder: str, **changes: Any) -> Child:
    every = _save_every(scene)
    settings = settings_of(scene, "9m", f"{name}_{folder}", **METHODS[name], save_every=every, **changes)
    settings |= {"num_training_steps": 3 * every, "batch_size": scene.size(16, 4)}
    log = scene.folder / f"{name}_{folder}{'_again' if changes else ''}.log"
    return whole_run(settings, log)


def _wait_for_update(folder: Path, child: Child, update: int) -> None:
    deadline = time.monotonic() + 60
    while _last_update(folder / "metrics.jsonl") < update:
        if not child.running() or time.monotonic() > deadline:
            raise RuntimeError(f"a run did not come to update {update}: {child.last_words()}")
        time.sleep(0.01)


def _last_update(file: Path) -> int:
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["update_step"])
        except (ValueError, KeyError):  # it is being written, or says something else
            continue
    return 0


def _compare(scene: Scene, lines: Lines, name: str, what: str) -> None:
    last = f"model_{3 * _save_every(scene)}"
    one, other = (saved_tensors(scene.folder / f"{name}_{folder}" / last) for folder in ("stopped", "at_once"))
    unequal = differing(one, other)
    seen = f"{len(one)} tensors equal" if not unequal else f"{len(unequal)} of {len(one)} differ, {unequal[0]}"
    lines.holds(what, not unequal, seen, "every bit")
