"""What an update is expected to need: from the simulation, where this version has it, or from a measured table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from peft_pretraining.config import cli

from ..children import Child
from ..scene import Scene, argv

GIB = 2**30


@dataclass(frozen=True)
class Expected:
    peak: float
    """GiB of an ordinary update."""
    first: float | None
    """GiB of update 0, where it is known."""
    source: str


def simulated(scene: Scene, settings: dict[str, Any]) -> Expected | None:
    """None where this version has no simulation. It replaces parts of torch, so it has a process of its own."""
    try:
        from peft_pretraining.report.footprint.drive import Simulation
    except ImportError:
        return None
    result = scene.folder / "simulated.json"

    def act() -> None:
        launch = cli.load(argv(settings), environ={})
        with Simulation(launch.config, launch.facts.model or {}) as simulation:
            first, ordinary = (simulation.update(step).peak for step in (0, 1))
        result.write_text(json.dumps([ordinary / GIB, first / GIB]))

    child = Child.start(act, scene.folder / "simulated.log")
    if not child.wait(40) or child.code:
        raise RuntimeError(f"the simulation failed: {child.last_words()}")
    ordinary, first = json.loads(result.read_text())
    return Expected(ordinary, first, "simulated")
