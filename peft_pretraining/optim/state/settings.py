"""What a parameter group may say. Whatever is wrong raises `ValueError` with the setting's name and value."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "initial_momentum"}
)
"""What torch's schedulers keep in the groups."""


def check_number(name: str, value: Any, below: float = math.inf) -> None:
    """A finite number in [0, below), or a tensor with one."""
    plain = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not plain and not (isinstance(value, Tensor) and value.numel() == 1):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    if value >= below:
        raise ValueError(f"{name} must be below {below:g}, got {value}")


def check_whole(name: str, value: Any) -> None:
    """An integer of any type; not 2.0, and not True."""
    try:
        if isinstance(value, bool):
            raise TypeError
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def check_betas(betas: Any) -> None:
    """Two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, below=1)


def check_keys(given: Iterable[str], known: Iterable[str]) -> None:
    """Only settings that are known, or that a scheduler keeps in the groups, may be given."""
    if unknown := sorted(map(str, set(given) - set(known) - _OF_SCHEDULERS - {"params", "param_names"})):
        settings = ", ".join(sorted(set(known)))
        raise ValueError(f"unknown settings of a parameter group: {', '.join(unknown)}; there are {settings}")


def check_numbers(group: dict[str, Any]) -> None:
    """Settings of the update rules. The rules' `betas` and `beta1` may be None."""
    for name in ("lr", "eps", "weight_decay", "momentum", "dampening", "scale"):
        if name in group:
            check_number(name, group[name])
    if group.get("betas") is not None:
        check_betas(group["betas"])
    if group.get("beta1") is not None:
        check_number("beta1", group["beta1"], below=1)
    if "seed" in group:
        check_whole("seed", group["seed"])


def check_projection(group: dict[str, Any]) -> None:
    """Types of the settings of a projection; what they may be together is `bases.basis_rule`'s business."""
    if group["rank"] is not None:
        check_whole("rank", group["rank"])
    check_whole("update_proj_gap", group["update_proj_gap"])
    if group["rand_ratio"] is not None:
        check_number("rand_ratio", group["rand_ratio"])
    if (steps := group["num_training_steps"]) is not None:
        check_whole("num_training_steps", steps)
        if steps < 1:
            raise ValueError(f"num_training_steps must be at least 1, got {steps}")
    if not isinstance(group["stagger_refresh"], bool):
        raise ValueError(f"stagger_refresh must be True or False, got {group['stagger_refresh']!r}")
