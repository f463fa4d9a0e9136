"""What an update is expected to need, by the simulation that `report.plan` is made of."""

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
    first: float
    """GiB of update 0."""
    launches: int
    """Kernels of an ordinary update; the simulation counts up to a sixth too many."""
    waits: int
    """Of the host for the device in it."""


def simulated(scene: Scene, settings: dict[str, Any]) -> Expected:
    """The simulation replaces parts of torch, so it has a process of its own."""
    result = scene.folder / "simulated.json"

    def act() -> None:
        from peft_pretraining.report.footprint.drive import Simulation

        launch = cli.load(argv(settings), environ={})
        with Simulation(launch.config, launch.facts.model or {}) as simulation:
            first, ordinary = simulation.update(0).peak, simulation.update(1)
            counts = [sum(each.values()) for each in (ordinary.counts.launches(), ordinary.counts.host_waits())]
        result.write_text(json.dumps([ordinary.peak / GIB, first / GIB, *counts]))

    child = Child.start(act, scene.folder / "simulated.log")
    if not child.wait(40) or child.code:
        raise RuntimeError(f"the simulation failed: {child.last_words()}")
    return Expected(*json.loads(result.read_text()))
