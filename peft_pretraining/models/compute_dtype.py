"""Layers that compute in another dtype than that of their weights, without autocast.

The embedding begins activations in the compute dtype, and whatever follows keeps to its input's: a linear layer casts
its weight to that of its input, a norm its output. So activations are the same whatever the weights are kept in, and
where FSDP2 casts weights while it gathers them, these casts do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from peft_pretraining.models.lean_functions import GatedLinear, GatedProduct, Norm


class _CastTwice(torch.autograd.Function):
    """x Wᵀ for a W of another dtype, which is cast again in the backward pass: a cast W that is kept in between would
    be half as large as the model's float32 weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))  # (..., n) @ (n, m) -> (..., m)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = grad_output @ weight.to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (x.flatten(0, -2).T @ grad_output.flatten(0, -2)).T.to(weight.dtype)  # as of `F.linear`
        return of_x, of_weight


class Linear(nn.Linear):
    """y = x Wᵀ + bias in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return super().forward(x)
        product: Tensor = _CastTwice.apply(x, self.weight)
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def of_gated_product(self, gate: Tensor, up: Tensor) -> Tensor:
        """y = (silu(gate) * up) Wᵀ + bias, which keeps gate and up alone for the backward pass."""
        product: Tensor = GatedLinear.apply(gate, up, self.weight)
        return product if self.bias is None else product + self.bias.to(gate.dtype)


class Embedding(nn.Embedding):
    """Rows of the table, in a dtype of their own."""

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.compute_dtype)


class RMSNorm(LlamaRMSNorm):
    """The norm, whose weight may have more digits than its input, in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = Norm.apply(x, self.weight, self.variance_epsilon)
        return normed


class MLP(LlamaMLP):
    """down(silu(gate(x)) * up(x)), which keeps two wide matrices for the backward pass instead of four, or three where
    the last layer is none of the above."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor
        if isinstance(self.down_proj, Linear):
            out = self.down_proj.of_gated_product(gate, up)
        else:
            out = self.down_proj(GatedProduct.apply(gate, up))
        return out


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a LLaMA compute in `dtype`, whatever its weights' is. Modules and parameters stay the objects that they are.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    >>> compute_in(model, torch.bfloat16)
    >>> model(torch.tensor([[1, 2]])).logits.dtype, model.lm_head.weight.dtype
    (torch.bfloat16, torch.float32)
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is nn.Embedding:
            module.__class__ = Embedding
            vars(module)["compute_dtype"] = dtype
        elif type(module) is LlamaRMSNorm:
            module.__class__ = RMSNorm
        elif type(module) is LlamaMLP and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
            module.__class__ = MLP


def is_norm(module: nn.Module) -> bool:
    """Whether a module is one of a LLaMA's norms."""
    return isinstance(module, LlamaRMSNorm)
