"""Deterministic gradients, and small projected optimizers that run on them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.optim import LowRankOptimizer

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "adamw"},
    "adamw8bit": {"rule": "adamw8bit"},
    "adafactor": {"rule": "adafactor"},
    "adafactor with beta1": {"rule": "adafactor", "beta1": 0.9},
    "lion": {"rule": "lion"},
    "sgd": {"rule": "sgd", "momentum": 0.9, "dampening": 0.9},
    "plain sgd": {"rule": "sgd"},
}


def matrix(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(matrix(shape, seed, dtype))


def build(weight: Tensor, regular: Iterable[Tensor] = (), rule: Any = "adamw", **changes: Any) -> LowRankOptimizer:
    """An optimizer that projects `weight`; `changes` are settings of its group or of the optimizer."""
    optimizer = {"lr": 0.01, "weight_decay": 0.1}
    of_optimizer = {*optimizer, "betas", "eps", "beta1", "momentum", "dampening", "svd_method", "seed"}
    of_optimizer |= {"full_norm", "refresh_accumulation"}
    optimizer |= {name: changes.pop(name) for name in of_optimizer & changes.keys()}
    groups = [{"params": [weight], "rank": 2, "update_proj_gap": 4, "scale": 0.5, "proj_type": "std", **changes}]
    if regular := list(regular):
        groups.insert(0, {"params": regular})
    return LowRankOptimizer(groups, rule=rule, **optimizer)


def set_gradients(weights: Iterable[Tensor], step: int) -> None:
    for index, weight in enumerate(weights):
        weight.grad = matrix(weight.shape, 1 + 100 * step + index, weight.dtype)


def train(optimizer: LowRankOptimizer, weights: Sequence[Tensor], first: int, last: int) -> None:
    """Updates `first` to `last` - 1, each with gradients of its own."""
    for step in range(first, last):
        set_gradients(weights, step)
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What `torch.save` and a `torch.load` that trusts nobody make of it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
