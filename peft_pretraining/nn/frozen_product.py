"""x Wᵀ for a frozen W, which may be quantised, and whose full gradient may be asked for on the side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from peft_pretraining.nn.low_rank_linear import LowRankLinear


class FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ; the backward pass gives dY W, and adds dYᵀ X, or its projection, to `layer.full_gradient` if that is a
    tensor.

    W keeps `requires_grad=False` throughout, so DistributedDataParallel never sees it: nothing is reduced that was not
    asked for, and no update needs `find_unused_parameters`. A quantised W is dequantised twice instead of being kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, layer: LowRankLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*([x] if layer.full_gradient is not None else []))
        return F.linear(x, layer.dense_weight().to(x.dtype))  # (..., n) @ (n, m) -> (..., m)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        layer = ctx.layer
        if saved := ctx.saved_tensors:  # asked for once: activation checkpointing recomputes it each time
            (x,) = saved
            outputs = grad_output.reshape(-1, layer.out_features)  # (N, m)
            inputs = x.reshape(-1, layer.in_features)  # (N, n)
            layer.gather_gradient(outputs, inputs.to(outputs.dtype))  # they differ under autocast alone
        grad_input = grad_output @ layer.dense_weight().to(grad_output.dtype) if ctx.needs_input_grad[0] else None
        return grad_input, None, None


class RefreshProduct(torch.autograd.Function):
    """y = x Wᵀ + s·(x Aᵀ) Bᵀ of an update that gives the trained factor another gradient, that in a new basis.

    So x Aᵀ need not be kept for the one it would have: it gets zeros, and `FrozenProduct`'s sum on the side. Equal to
    the ordinary layer but for the order in which gradients of x are added up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, layer: LowRankLinear) -> Tensor:
        ctx.layer, ctx.trained = layer, trained
        ctx.save_for_backward(x)
        a, b = layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype)
        low = F.linear(F.linear(x, a) * layer.scale, b)
        return low.add_(F.linear(x, layer.dense_weight().to(x.dtype)))  # (..., n) -> (..., m)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor, None]:
        layer, trained = ctx.layer, ctx.trained
        (x,) = ctx.saved_tensors
        outputs = grad_output.reshape(-1, layer.out_features)  # (N, m)
        layer.gather_gradient(outputs, x.reshape(-1, layer.in_features).to(outputs.dtype))
        grad_input = None
        if ctx.needs_input_grad[0]:
            dtype = grad_output.dtype
            grad_input = grad_output @ layer.dense_weight().to(dtype)
            grad_input += (grad_output @ layer.lora_B.to(dtype) * layer.scale) @ layer.lora_A.to(dtype)
        return grad_input, trained.new_zeros(()).expand(trained.shape), None
