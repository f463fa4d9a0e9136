"""The most memory that an update needs, each in a fresh process."""

from __future__ import annotations

import resource
from typing import Any

import torch

from ..lines import Lines
from ..scene import Scene
from ..trainee import GIB, Trainee, settings_of
from .planned import Expected, simulated

TOLERANCE = 1.02
"""Of what was simulated or measured: cuBLAS's workspaces and rounding in the allocator are not counted there."""

LARGE = {"batch_size": 32}
LAYERWISE = {"optimizer": "adamw8bit", "per_layer": True}
SEVEN = {"method": "galore", "rank": 1024, "batch_size": 16, "activation_checkpointing": True, **LAYERWISE}
CASES: dict[str, tuple[str, dict[str, Any], Expected]] = {
    # GiB: simulated with an earlier version, all in bfloat16, and within 2% of what an H200 then needed. Later versions
    # may need less; where this one has the simulation itself, that is the limit.
    "60m full_rank": ("60m", {"method": "full_rank"}, Expected(9.10, None, "earlier")),
    "60m galore": ("60m", {"method": "galore", "rank": 128}, Expected(9.03, None, "earlier")),
    "1b full_rank": ("1b", {"method": "full_rank", **LARGE}, Expected(27.57, None, "earlier")),
    "1b galore": ("1b", {"method": "galore", "rank": 512, **LARGE}, Expected(24.53, None, "earlier")),
    "1b galore 8-bit per-layer": (
        "1b",
        {"method": "galore", "rank": 512, **LARGE, **LAYERWISE},
        Expected(23.73, None, "earlier"),
    ),
    "1b lora": ("1b", {"method": "lora", "rank": 512, **LARGE}, Expected(27.06, None, "earlier")),
    "1b golore_adapter": (
        "1b",
        {"method": "golore_adapter", "rank": 512, **LARGE},
        Expected(24.71, 30.71, "earlier"),
    ),
    "7b galore 8-bit per-layer": ("7b", SEVEN, Expected(20.46, None, "earlier")),
    "7b galore 8-bit per-layer, accumulation 2": (
        "7b",
        {**SEVEN, "total_batch_size": 32},
        Expected(27.03, 31.75, "earlier"),
    ),
}
UNMEASURED_FIRST = 1.3
"""How much more than an ordinary update, at most, the first one may need where nobody has looked."""


def peak(scene: Scene, lines: Lines, case: str) -> None:
    model, changes, earlier = CASES[case]
    if scene.quick:
        changes = {**changes, "rank": 4, "batch_size": 4} if "rank" in changes else changes
    settings = settings_of(scene, model, "run", dtype="bfloat16", update_proj_gap=_gap(changes), **changes)
    expected = simulated(scene, settings) or (None if scene.quick else earlier)
    if scene.on_cuda and expected and (needed := max(expected.peak, expected.first or 0) * 1.05) > scene.memory():
        lines.absent(f"{case}: peak", f"it needs {needed:.1f} GiB of memory, this device has {scene.memory():.1f}")
        return
    with Trainee(settings, scene.device) as trainee:
        first, ordinary = (_of_an_update(scene, trainee) for _ in range(2))
    if not scene.on_cuda or expected is None:
        lines.reports(f"{case}: the process, with all that it has imported", ordinary, "GiB")
        return
    lines.at_most(f"{case}: an update ({expected.source})", ordinary, expected.peak * TOLERANCE, "GiB")
    if expected.first is not None:
        lines.at_most(f"{case}: update 0 ({expected.source})", first, expected.first * TOLERANCE, "GiB")
    else:
        lines.reports(f"{case}: update 0", first, "GiB")


def _gap(changes: dict[str, Any]) -> int | None:
    return 200 if changes["method"] in ("galore", "golore_adapter") else None


def _of_an_update(scene: Scene, trainee: Trainee) -> float:
    """GiB: of the device in this update; on the CPU, of the process since its start."""
    if scene.on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    trainee.update()
    if scene.on_cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
