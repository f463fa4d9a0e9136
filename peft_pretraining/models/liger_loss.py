"""Head and cross-entropy in one by liger-kernel's triton kernels, an optional dependency."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from peft_pretraining.models.loss import IGNORED

HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def liger_loss() -> HeadLoss | None:
    """As `fused_loss.fused_token_loss`, by liger-kernel; None where that is not installed, cannot be imported, or is
    too old to add up the gradient of the head's weight in float32 (before 0.6.1).

    Products are in the dtype of the hidden states, and gradients of 16-bit logits are rounded to it. In every forward
    and every backward pass it waits for the device, once.
    """
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except Exception:  # triton fails in ways of its own where there is no GPU
        return None
    if "accum_dtype" not in inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)

    def token_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # Under autocast a wider weight is cast for the products alone, and its gradient is in its own dtype.
        casts = weight.dtype != hidden.dtype
        with torch.autocast(hidden.device.type, hidden.dtype) if casts else contextlib.nullcontext():
            total: Tensor = loss(weight, hidden.flatten(0, -2), labels.flatten())
        return total

    return token_loss
