"""Parts of a decoder layer that keep less for the backward pass than autograd would, and compute the same.

For (tokens, d) activations in bfloat16, transformers' norm leaves a float32 copy of its input, and the normed input, to
the backward pass: 6 bytes a number, twice a layer. Here the input itself, which the residual stream keeps anyway, and
one number per token are kept. Of silu(gate) * up, silu is computed again instead of being kept, and the product, too,
where the layer behind it is known.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(torch.autograd.Function):
    """w * x / rms(x), with rms in float32 at least: y in the dtype of x (arXiv 1910.07467, equation 4).

    As transformers computes it: x / rms(x) is rounded to the dtype of x before it is multiplied by w.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _wide(x).pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (weight * (_wide(x) * scale).to(x.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, of_weight, wide = _wide(x) * scale, None, _wide(grad)
        if ctx.needs_input_grad[1]:
            of_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        of_normed = wide * weight
        # dx = (g - n mean(g n)) / rms
        along = (of_normed * normed).mean(-1, keepdim=True)
        return of_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), of_weight, None


class GatedProduct(torch.autograd.Function):
    """silu(gate) * up, in the dtype of both (arXiv 2002.05202, SwiGLU)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return of_gate, F.silu(gate).mul_(grad)


class GatedLinear(torch.autograd.Function):
    """(silu(gate) * up) Wᵀ in the dtype of gate and up, which are kept; the product is made again in the backward pass,
    and W is cast twice where it has another dtype."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))  # (..., n) @ (n, m) -> (..., m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        of_gate = of_up = of_weight = None
        if ctx.needs_input_grad[2]:
            product = F.silu(gate).mul_(up).flatten(0, -2)
            of_weight = (product.T @ grad.flatten(0, -2)).T.to(weight.dtype)  # as of `F.linear`
            del product
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_product = grad @ weight.to(grad.dtype)
            of_gate = torch.ops.aten.silu_backward(of_product * up, gate)
            of_up = F.silu(gate).mul_(of_product)
        return of_gate, of_up, of_weight
