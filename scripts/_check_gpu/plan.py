"""The steps, shortest answers first, with the seconds that each may take. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

PEAKS = (
    *("60m full_rank", "60m galore", "1b full_rank", "1b galore", "1b galore 8-bit per-layer", "1b lora"),
    *("1b golore_adapter", "7b galore 8-bit per-layer"),
)
SPEEDS = ("60m", "350m", "1b")
LAUNCHES = "full_rank,galore,galore per layer,online_subspace_descent,switchlora"


@dataclass(frozen=True)
class Step:
    """One process of its own: its memory is fresh, and a crash ends it alone."""

    name: str
    function: str
    """`module.function` of the folder `steps`, called with a `Scene` and `Lines`."""
    seconds: float
    case: str = ""
    """For the function; a step of several processes has one for each."""
    quick: bool = True
    """Whether it is part of `--quick`."""
    devices: int = 1
    """GPUs that it needs."""


STEPS = (
    Step("versions", "machine.versions", 40),
    Step("parity", "parity.same_as_the_cpu", 90),
    *(Step("group of one", "groups.of_one", 60, case) for case in ("ddp", "fsdp", "hsdp")),
    Step("group of one", "groups.torchrun", 60, quick=False),
    Step("resume", "resume.killed", 100, "killed"),
    Step("resume", "resume.terminated", 60, "SIGTERM"),
    *(
        Step("peaks", "peaks.peak", 120 if case.startswith("7b") else 40, case, quick=case == PEAKS[1])
        for case in PEAKS
    ),
    Step("settings", "settings.every_one", 100),
    Step("refresh", "refresh.bases", 40),
    Step("launches", "speed.launches", 120, LAUNCHES),
    *(Step("speed", "speed.updates", 240, case, quick=case == SPEEDS[0]) for case in SPEEDS),
    Step("precision", "precision.compared", 90),
    Step("several GPUs", "groups.of_two", 90, quick=False, devices=2),
)
