"""The device computes what the CPU computes, in float64: every method, with every update rule, per layer or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from peft_pretraining.methods import METHODS
from peft_pretraining.optim.rule_settings import RULES

from ..lines import Lines
from ..scene import Scene
from ..trainee import Trainee, largest_difference, settings_of

LOSSES, WEIGHTS = 1e-9, 1e-6
"""Sums in another order, over six updates."""
UPDATES, GAP = 6, 3


def cases(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings; 8-bit states have no float64 to be compared in, ZeRO needs a group."""
    for spec in METHODS.values():
        rules = [rule for rule in spec.update_rules if "8bit" not in rule and rule != "adam_zero"]
        for rule in rules[:1] if quick else rules:
            settings = {"method": spec.name, "optimizer": rule, **RULES[rule].tiny, **spec.tiny}
            if "update_proj_gap" in spec.own:
                settings["update_proj_gap"] = GAP
            yield f"{spec.name}, {rule}", settings
            if spec.allows.per_layer and not quick:
                yield f"{spec.name}, {rule}, per layer", {**settings, "per_layer": True, "clip_grad_norm": 0}


def same_as_the_cpu(scene: Scene, lines: Lines, case: str) -> None:
    worst: dict[str, tuple[float, float]] = {}
    for number, (name, changes) in enumerate(cases(scene.quick)):
        found = []
        for device in (torch.device("cpu"), scene.device):
            settings = settings_of(scene, "tiny", f"{number}{device.type}{len(found)}", precision="fp64", **changes)
            with Trainee({**settings, "batch_size": 4, "max_length": scene.length}, device) as trainee:
                losses = [trainee.update().loss for _ in range(UPDATES)]
                found.append((losses, trainee.effective_weights()))
        (theirs, expected), (ours, weights) = found
        losses_apart = max(abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(ours, theirs, strict=True))
        worst[name] = losses_apart, largest_difference(weights, expected)
    for index, (what, limit) in enumerate((("losses", LOSSES), ("weights", WEIGHTS))):
        name = max(worst, key=lambda each: _order(worst[each][index]))
        text = f"{what} of {len(worst)} settings are the CPU's in float64 (furthest: {name})"
        lines.at_most(text, worst[name][index], limit)


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value
