"""Head and cross-entropy in one by liger-kernel's triton kernels, an optional dependency."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from peft_pretraining.models.fused_loss import fused_token_loss
from peft_pretraining.models.loss import IGNORED

log = logging.getLogger("peft_pretraining")

HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def liger_loss() -> HeadLoss | None:
    """As `fused_loss.fused_token_loss`, by liger-kernel; None where that is not installed, cannot be imported, or is
    too old to add up the gradient of the head's weight in float32.

    It knows no float64, and waits for the device once in every forward and in every backward pass: to count the
    targets, and to see whether the gradient of the loss is 1.
    """
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    except Exception as error:  # triton, which it imports, raises errors of its own without a driver or a compiler
        log.warning("liger-kernel is installed, but cannot be imported: %s: %s", type(error).__name__, error)
        return None
    if "accum_dtype" not in inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)

    def token_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if hidden.dtype == torch.float64:
            return fused_token_loss(hidden, weight, labels)
        # Under autocast a wider weight is cast for the products alone, and its gradient is in its own dtype.
        casts = weight.dtype != hidden.dtype
        with torch.autocast(hidden.device.type, hidden.dtype) if casts else contextlib.nullcontext():
            total: Tensor = loss(weight, hidden.flatten(0, -2), labels.flatten())
        return total

    return token_loss
