"""Gradients of 16-bit weights, added up in float32 over micro-batches.

A bfloat16 sum of 32 gradients is wrong by 0.6% of itself, of 128 by 1%. One process lets autograd add up in float32
(`param.grad_dtype`); FSDP2 does so by itself, in the dtype that it reduces in. DDP does neither: its buckets have the
weights' dtype. There each backward pass that reduces nothing leaves its gradients here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_narrow(param: Tensor) -> bool:
    """Whether a weight is trained whose gradients would be added up in 16 bits."""
    return param.requires_grad and param.dtype in (torch.bfloat16, torch.float16)


def add_up_in_float32(model: nn.Module) -> None:
    """Let autograd keep float32 gradients of 16-bit weights, where this torch can (2.10 and later)."""
    if hasattr(torch.Tensor, "grad_dtype"):
        for param in filter(is_narrow, model.parameters()):
            param.grad_dtype = torch.float32


class WideSums:
    """Float32 sums of what DDP has not reduced yet."""

    def __init__(self, params: Iterable[Tensor]):
        self._params = list(filter(is_narrow, params))
        self._sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """After a backward pass that reduced nothing: add its gradients to the sums, and drop them."""
        for param in self._params:
            if param.grad is None:
                continue
            if (known := self._sums.get(param)) is None:
                self._sums[param] = param.grad.float()
            else:
                known.add_(param.grad)
            param.grad = None

    def total(self, param: Tensor, grad: Tensor) -> Tensor:
        """The sum with the gradient of the last backward pass, which is then forgotten; float32, or `grad` itself where
        the weight is no narrower."""
        if not is_narrow(param):
            return grad
        known = self._sums.pop(param, None)
        return grad.float() if known is None else known.view_as(grad).add_(grad)
