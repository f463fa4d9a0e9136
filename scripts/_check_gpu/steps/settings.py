"""Every setting trains, and leaves no memory behind."""

from __future__ import annotations

import gc
import math
from typing import Any

import torch

from ..lines import Lines
from ..scene import Scene
from ..trainee import MIB, Trainee, alive, settings_of
from . import every_setting

UPDATES = 8
LEFT = 40.0
"""MiB: cuBLAS's workspaces. Weights of 60M are 110, what a run that is not freed leaves more."""


def every_one(scene: Scene, lines: Lines, case: str) -> None:
    if why := scene.lacks(14):
        lines.absent("60m: every setting", why)
        return
    for number, (name, changes) in enumerate(every_setting.settings(scene.quick).items()):
        try:
            first, last, left = _train(scene, f"run{number}", changes)
        except ImportError as error:
            lines.absent(name, str(error).splitlines()[0][:80])
            continue
        except Exception as error:  # the other settings are tried all the same
            lines.holds(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
            continue
        limit = LEFT if scene.on_cuda else 0.0
        seen = f"{first:.3f} -> {last:.3f}, {left:.2g} MiB left"
        lines.holds(name, last < first and left <= limit, seen, f"falls, <= {limit:.0f} MiB")


def _train(scene: Scene, folder: str, changes: dict[str, Any]) -> tuple[float, float, float]:
    """First and last loss, and MiB that are left when the run is gone, beyond those before it."""
    before = torch.cuda.memory_allocated() if scene.on_cuda else 0
    with Trainee(settings_of(scene, "60m", folder, **changes), scene.device) as trainee:
        watched = trainee.watch()
        losses = [trainee.update().loss for _ in range(UPDATES)]
    gc.collect()
    if scene.on_cuda:
        torch.cuda.empty_cache()
        left = max(torch.cuda.memory_allocated() - before, alive(watched))
    else:
        left = alive(watched)
    return losses[0], losses[-1] if all(map(math.isfinite, losses)) else math.nan, left / MIB
