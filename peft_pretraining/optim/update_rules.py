"""Update rules: what becomes of a gradient, in low-rank coordinates or, for unprojected weights, in full ones.

A rule turns a gradient into a direction D; the weight then moves by -factor * scale * back(D).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class UpdateRule(Protocol):
    def init_state(self, state: dict[str, Any], like: Tensor) -> None:
        """Create the rule's tensors for gradients of `like`'s shape, dtype and device."""

    def direction(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        """The direction D, in the shape of `grad`, and the factor (rate included) to subtract it with."""


class AdamW:
    """Adam in the form of GaLore's authors: ε is added to √v before the bias correction."""

    def init_state(self, state: dict[str, Any], like: Tensor) -> None:
        state["exp_avg"] = torch.zeros_like(like)
        state["exp_avg_sq"] = torch.zeros_like(like)

    def direction(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        beta1, beta2 = group["betas"]
        k = int(state["step"])  # this parameter's updates, this one included
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(grad, 1 - beta1)  # β1 m + (1-β1) R
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)  # β2 v + (1-β2) R²
        correction = math.sqrt(1 - beta2**k) / (1 - beta1**k)
        return m / v.sqrt().add_(group["eps"]), group["lr"] * correction


UPDATE_RULES: dict[str, type[UpdateRule]] = {"adamw": AdamW}
