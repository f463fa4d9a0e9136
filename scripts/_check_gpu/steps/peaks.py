"""The most memory that an update needs, each in a fresh process."""

from __future__ import annotations

import resource
from typing import Any

import torch

from ..lines import Lines
from ..scene import Scene
from ..trainee import GIB, Trainee, settings_of
from .planned import simulated

TOLERANCE, WORKSPACES = 1.02, 0.15
"""Of what is simulated, and GiB beyond: rounding in the allocator and cuBLAS's workspaces, on an H200 0.06 to 0.15, are
not counted there."""

LARGE = {"batch_size": 32}
LAYERWISE = {"optimizer": "adamw8bit", "per_layer": True}
SEVEN = {"method": "galore", "rank": 1024, "batch_size": 16, "activation_checkpointing": True, **LAYERWISE}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "60m full_rank": ("60m", {"method": "full_rank"}),
    "60m galore": ("60m", {"method": "galore", "rank": 128}),
    "1b full_rank": ("1b", {"method": "full_rank", **LARGE}),
    "1b galore": ("1b", {"method": "galore", "rank": 512, **LARGE}),
    "1b galore 8-bit per-layer": ("1b", {"method": "galore", "rank": 512, **LARGE, **LAYERWISE}),
    "1b lora": ("1b", {"method": "lora", "rank": 512, **LARGE}),
    "1b golore_adapter": ("1b", {"method": "golore_adapter", "rank": 512, **LARGE}),
    "7b galore 8-bit per-layer": ("7b", SEVEN),
}
LIMITS = {"60m full_rank": 3.6, "60m galore": 3.6, "1b galore": 16.0}
"""GiB that are not to be exceeded, whatever is simulated."""


def peak(scene: Scene, lines: Lines, case: str) -> None:
    model, changes = CASES[case]
    if scene.quick:
        changes = {**changes, "rank": 4, "batch_size": 4} if "rank" in changes else changes
    settings = settings_of(scene, model, "run", precision="bf16", update_proj_gap=_gap(changes), **changes)
    expected = simulated(scene, settings)
    if why := scene.lacks(1.05 * max(expected.peak, expected.first)):
        lines.absent(f"{case}: peak", why)
        return
    with Trainee(settings, scene.device) as trainee:
        first, ordinary = (_of_an_update(scene, trainee) for _ in range(2))
    if scene.on_cuda:
        lines.at_most(f"{case}: an update", ordinary, expected.peak * TOLERANCE + WORKSPACES, "GiB")
        if case in LIMITS:
            lines.at_most(f"{case}: an update, at all", ordinary, LIMITS[case], "GiB")
        lines.at_most(f"{case}: update 0", first, expected.first * TOLERANCE + WORKSPACES, "GiB")
        return
    lines.reports(f"{case}: an update on a GPU, simulated", expected.peak, "GiB")
    lines.reports(f"{case}: this process, with all that it has imported", ordinary, "GiB")


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
