"""A small model and its optimizer, for updates inside the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.optim import LowRankOptimizer

RULES = {"sgd": {"rule": "sgd", "lr": 0.1}, "adamw": {"rule": "adamw", "lr": 0.01, "weight_decay": 0.1}}


def setup(
    rule: str = "sgd",
    rank: int = 4,
    basis_dtype: str = "auto",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[nn.Sequential, LowRankOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Tanh(), nn.Linear(24, 8, bias=False)).to(dtype)
    projected = {"rank": rank, "update_proj_gap": 3, "basis_dtype": basis_dtype}
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight], **projected}]
    return model, LowRankOptimizer(groups, **{**RULES[rule], **changes})


def loss(model: nn.Module, step: int = 0, size: float = 1.0) -> Tensor:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    return (model(x) - x[:, :8]).square().mean() * size


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b)
