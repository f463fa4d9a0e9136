"""The linear layer with low-rank factors that LoRA, ReLoRA, SwitchLoRA and GoLore's adapter form share.

Hu et al., arXiv 2106.09685, section 4.1. With W (m, n) frozen, A (r, n) and B (m, r):

    y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ,     effective weight W + s·B·A

What happens to W, A and B over time (merge, reset, switch, new basis) is for the methods to say. They do it with
`add_to_weight`, which computes in float32 (float64 for float64). A W of 16 bits keeps beside it what rounding takes
from it (nn/weight_rest.py), so that any number of corrections adds up as in float32.

W, A and B may be sharded over devices (distributed/sharding.py). What is computed from them between passes is then this
device's part of W, with rows of B and columns of A that meet it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.distributed.gathering import meeting
from peft_pretraining.distributed.sharding import ShardInfo, distribute_like, local
from peft_pretraining.nn import weight_rest
from peft_pretraining.nn.frozen_product import FrozenProduct, RefreshProduct
from peft_pretraining.nn.quantized import QuantizedWeight
from peft_pretraining.optim.tensors.full_precision import full_float32_products
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, Bases

WEIGHT_REST = "weight_rest"
"""Of the rest in a layer's state dict."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which corrections of a weight of this dtype are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LowRankLinear(nn.Module):
    """A linear layer with factors, made from `linear`, whose weight and bias it takes over. A and B start at zero.

    rank: at most min(m, n) is used.
    scale: s; negative for GoLore. With `train_scaling` s = tanh(scaling), a trained scalar that starts at 1.
    corrected: W is changed again and again, so that in 16 bits it needs its rest; without, a change is rounded.
    lora_only: drop W; then nothing can be merged.
    quantize: "4bit" or "8bit" keeps W quantised (bitsandbytes); `double_quant` quantises the 4-bit constants, too.

    >>> layer = LowRankLinear(nn.Linear(6, 4), rank=2, scale=0.5)
    >>> layer.lora_A.shape, layer.lora_B.shape, layer.weight.requires_grad
    (torch.Size([2, 6]), torch.Size([4, 2]), False)
    >>> x = torch.randn(3, 6)
    >>> layer.set_factors(torch.randn(2, 6), torch.randn(4, 2), keep_function=False)
    >>> before = layer(x)
    >>> layer.merge()
    >>> int(layer.lora_B.count_nonzero())
    0
    >>> torch.testing.assert_close(layer(x), before)
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scale: float,
        *,
        dropout: float = 0.0,
        train_scaling: bool = False,
        corrected: bool = False,
        lora_only: bool = False,
        quantize: str | None = None,
        double_quant: bool = False,
    ):
        super().__init__()
        if lora_only and quantize:
            raise ValueError(f"quantize {quantize!r} needs a frozen weight, which lora_only drops")
        dense = linear.weight.detach()  # (m, n)
        self.out_features, self.in_features = dense.shape
        self.rank = min(rank, *dense.shape)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.lora_only = lora_only
        self.quantized: QuantizedWeight | None = None
        self.weight: nn.Parameter | None
        self.register_parameter("weight", None)
        if quantize:
            self.quantized = QuantizedWeight(dense, quantize, double_quant)
        elif not lora_only:
            self.weight = nn.Parameter(dense, requires_grad=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.lora_A = nn.Parameter(dense.new_zeros(self.rank, self.in_features))
        self.lora_B = nn.Parameter(dense.new_zeros(self.out_features, self.rank))
        self.scaling: nn.Parameter | None
        self.register_parameter("scaling", nn.Parameter(dense.new_ones(())) if train_scaling else None)
        self.turned = False
        """Whether the plain layer stores Wᵀ (transformers' Conv1D)."""
        self._rest: Tensor | None = None
        if corrected and self.weight is not None and weight_rest.has_rest(dense.dtype):
            self._rest = torch.zeros_like(dense, dtype=torch.int16)
        self.full_gradient: Tensor | None = None
        """While this is a tensor (m, n), backward passes add the gradient of the full weight to it. One number that is
        expanded to that shape makes room when it is needed."""
        self.gather_in: Bases | None = None
        """With a basis, that gradient is projected before it is added up: `full_gradient` has the shape of R."""
        self.lean_refresh = False
        """While `full_gradient` is gathered, the trained factor's own gradient is not needed."""
        self.gradient_part: Callable[[Tensor], Tensor] | None = None
        """What makes of a gradient (m, n) the part that `full_gradient` has, where W is sharded."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, scale={self.scale:g}"

    @property
    def runs_eagerly(self) -> bool:
        """Whether its passes are not those that a compiler has seen (models/compiled.py): they gather a gradient."""
        return self.full_gradient is not None

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype  # weights may have more digits (models/compute_dtype.py)
        bias = None if self.bias is None else self.bias.to(dtype)
        trained = self.lora_A if self.lora_A.requires_grad else self.lora_B
        if self.full_gradient is not None and self.lean_refresh and not (self.dropout.p and self.training):
            product = RefreshProduct.apply(x, trained, self)
            return product if bias is None else product + bias
        low = F.linear(self.dropout(x), self.lora_A.to(dtype)) * self.current_scale()  # (..., n) -> (..., r)
        low = F.linear(low, self.lora_B.to(low.dtype))  # (..., m)
        if self.lora_only:
            return low if bias is None else low + bias
        if self.weight is not None and self.full_gradient is None and self.weight.dtype == dtype:
            return F.linear(x, self.weight, bias) + low
        # The trained factor goes along so that autograd visits the product even if x needs no gradient.
        product = FrozenProduct.apply(x, trained, self)
        return low + (product if bias is None else product + bias)

    def current_scale(self) -> float | Tensor:
        return self.scale if self.scaling is None else self.scaling.tanh()

    def dense_weight(self) -> Tensor:
        """W (m, n), the frozen part, dequantised if need be; zeros under `lora_only`."""
        if self.lora_only:
            return torch.zeros_like(self.lora_B[:, :1] @ self.lora_A[:1])
        return self.frozen_weight if self.quantized is None else self.quantized.dense()

    @property
    def frozen_weight(self) -> nn.Parameter:
        """W (m, n) of a layer that keeps it as it is: neither dropped nor quantised."""
        assert self.weight is not None, "the weight is dropped or quantised"
        return self.weight

    @property
    def rest(self) -> Tensor | None:
        """The rest of W (m, n), int16, sharded and placed as W is now; None where W is all there is.

        Neither a parameter nor a buffer: its digits must never be cast, averaged or broadcast.
        """
        if self._rest is None:
            return None
        weight = self.frozen_weight
        shard, device = ShardInfo.of(weight), local(weight).device
        if shard.dim is not None and ShardInfo.of(self._rest).dim is None:  # W has been sharded since
            part = shard.part(self._rest, shard.dim).to(device, copy=True)
            self._rest = distribute_like(part, weight, shard.dim, shard.shape[shard.dim])
        elif local(self._rest).device != device:
            self._rest = self._rest.to(device)
        return self._rest

    def follow_sharding(self) -> None:
        """W, A and B have been sharded over devices: keep of what is no parameter this device's part, too."""
        _ = self.rest

    @torch.no_grad()
    def exact_weight(self) -> Tensor:
        """W with its rest, (m, n) or this device's part, in `working_dtype`."""
        dense, rest = local(self.dense_weight()), self.rest
        if rest is not None:
            return weight_rest.join(dense, local(rest))
        return dense.to(working_dtype(self.lora_A.dtype))

    def gather_gradient(self, outputs: Tensor, inputs: Tensor) -> None:
        """Add one backward pass's gradient of the full weight, dYᵀX (m, n), or its projection, to what has gathered:
        from the gradients (N, m) of the outputs and the inputs (N, n)."""
        gathered, basis = self.full_gradient, self.gather_in
        assert gathered is not None, "nobody asked for it"
        if basis is not None and LEFT in basis:
            gradient = (outputs @ basis[LEFT].to(outputs.dtype)).T @ inputs  # (r, N) @ (N, n) -> (r, n)
        elif basis is not None:
            gradient = outputs.T @ (inputs @ basis[RIGHT].to(inputs.dtype).T)  # (m, N) @ (N, r) -> (m, r)
        else:
            gradient = outputs.T @ inputs
        if self.gradient_part is not None:
            gradient = self.gradient_part(gradient)
        if gathered.numel() > 1 and not any(gathered.stride()):  # nothing has been added yet
            self.full_gradient = gradient.to(gathered.dtype)
        else:
            gathered += gradient

    @property
    def sharded_as(self) -> Tensor:
        """The parameter that says how (m, n) is sharded over devices."""
        return self.lora_B if self.weight is None else self.weight

    @torch.no_grad()
    @full_float32_products()
    def delta_weight(self) -> Tensor:
        """s·B·A (m, n), or this device's part, in float32 or float64."""
        high = working_dtype(self.lora_A.dtype)
        scale, shard = self.current_scale(), ShardInfo.of(self.sharded_as)
        b, a = meeting(self.lora_B, shard, 0), meeting(self.lora_A, shard, 1)
        return b.to(high) @ a.to(high) * (scale.to(high) if isinstance(scale, Tensor) else scale)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s·B·A (m, n) in the model's dtype, sharded as W: what a plain layer would hold. Changes nothing."""
        delta = self.delta_weight()
        dense = torch.zeros_like(delta) if self.lora_only else self.exact_weight()
        merged, shard = (dense + delta).to(self.lora_A.dtype), ShardInfo.of(self.sharded_as)
        return (
            merged if shard.dim is None else distribute_like(merged, self.sharded_as, shard.dim, shard.shape[shard.dim])
        )

    @torch.no_grad()
    def add_to_weight(self, correction: Tensor) -> None:
        """W += correction (m, n), or this device's part, given in `working_dtype`: added there, and rounded once if W
        keeps no rest (or quantised again)."""
        assert not self.lora_only, "there is no weight to correct"
        if self.quantized is not None:
            self.quantized.assign(self.quantized.dense().to(correction.dtype) + correction)
            return
        weight, rest = local(self.frozen_weight), self.rest
        if rest is not None:
            weight_rest.split(self.exact_weight() + correction, weight, local(rest))
        elif weight.dtype == correction.dtype:
            weight.add_(correction)
        else:
            weight.copy_(weight.to(correction.dtype) + correction)

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + s·B·A and B ← 0: the function stays what it was."""
        self.add_to_weight(self.delta_weight())
        local(self.lora_B).zero_()

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor, keep_function: bool) -> None:
        """Put in A (r, n) and B (m, r); with `keep_function` W takes back what they add: W ← W − s·B·A."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        if keep_function and b.any():
            self.add_to_weight(-self.delta_weight())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        """Casts, too: a W that gets more digits takes back its rest."""
        before = None if self.weight is None else self.weight.dtype
        super()._apply(fn, recurse)
        if self._rest is not None and self.frozen_weight.dtype != before:
            with torch.no_grad():
                weight, rest = local(self.frozen_weight), self.rest
                assert rest is not None
                value = weight_rest.join(weight.to(before), local(rest))
                if weight_rest.has_rest(weight.dtype):
                    weight_rest.split(value, weight, local(rest))
                else:
                    weight.copy_(value)
                    self._rest = None
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._rest is not None:
            destination[prefix + WEIGHT_REST] = self.rest

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        name = prefix + WEIGHT_REST
        if name in unexpected:
            unexpected.remove(name)
        given, rest = state_dict.get(name), self.rest
        if given is None:
            if rest is not None:  # an older state: W was all there was
                local(rest).zero_()
            return
        if self.weight is None or given.shape != self.weight.shape:
            errors.append(f"{name}: there is no weight of shape {tuple(given.shape)}")
            return
        with torch.no_grad():
            if rest is not None:
                local(rest).copy_(local(given))
            elif weight_rest.has_rest(state_dict[f"{prefix}weight"].dtype):
                local(self.weight).copy_(weight_rest.join(local(state_dict[f"{prefix}weight"]), local(given)))
