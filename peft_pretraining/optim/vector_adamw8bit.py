"""`VectorAdamW` with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo, distribute_like, local
from peft_pretraining.optim.state.base import gradient_of
from peft_pretraining.optim.tensors import blockwise
from peft_pretraining.optim.tensors.rounding import round_stochastically
from peft_pretraining.optim.vector_adamw import VectorAdamW

_NUMBERS_AT_ONCE = 2**22
"""Of the moments that exist in float32 at a time."""


class VectorAdamW8bit(VectorAdamW):
    """`VectorAdamW` whose moments of matrices are kept in 8 bits, in blocks of up to 256 numbers of one vector.

        >>> a = torch.nn.Parameter(torch.ones(8, 600))
        >>> optimizer = VectorAdamW8bit([{"params": [a], "vectors": 0}], lr=0.1)
        >>> {key: tuple(value.shape) for key, value in optimizer.state[a].items() if key.startswith("exp_avg_sq")}
        {'exp_avg_sq': (8, 600), 'exp_avg_sq_absmax': (8, 3)}

    No block has numbers of two vectors, so that the moments of one can be zeroed without a trace in another. State lies
    with vectors as rows. Where vectors are divided over devices, a device's part of one has blocks of its own: unless
    the part is whole blocks, the run goes on with as many devices alone. Arithmetic is in float32, and the weight is
    rounded once. Matrices of fewer than 4096 numbers, and vectors, keep float32 moments.
    """

    def _new_moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        vectors = group["vectors"]
        if param.ndim != 2 or param.numel() < blockwise.SMALLEST:
            dtype = torch.promote_types(param.dtype, torch.float32)
            return {key: torch.zeros_like(param, dtype=dtype) for key in blockwise.SIGNED}
        part, shard = _rows(local(param.detach()), vectors), ShardInfo.of(param)
        rows, blocks = len(part), blockwise.blocks_of(part.shape[1])
        dim = None if shard.dim is None else (1 - shard.dim if vectors == 1 else shard.dim)
        length, total = None, None  # over all devices, of the dimension that they divide
        if shard.dim is not None:
            length = shard.shape[shard.dim]
            total = length if dim == 0 else _total_blocks(blocks, shard, part.device)
        moments = {}
        for key in blockwise.SIGNED:
            codes = torch.zeros(part.shape, dtype=torch.uint8, device=part.device)
            scales = torch.zeros(rows, blocks, device=part.device)
            moments[key] = distribute_like(codes, param, dim, length)
            moments[f"{key}_absmax"] = distribute_like(scales, param, dim, total)
        return moments

    def reset_vectors(self, param: Tensor, index: Tensor, counts: bool = True) -> None:
        state = self.state[param]
        if state["exp_avg"].dtype != torch.uint8:
            super().reset_vectors(param, index, counts)
            return
        for key in blockwise.SIGNED:
            local(state[key]).index_fill_(0, index, 0)
            local(state[f"{key}_absmax"]).index_fill_(0, index, 0)  # then they are zero, whatever the bytes are
        if counts:
            state["step"].index_fill_(0, index, 0)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        in_8_bits = [param for param in params if self.state[param]["exp_avg"].dtype == torch.uint8]
        for param in in_8_bits:
            self._update_one(param, group)
        known = set(in_8_bits)
        if wide := [param for param in params if param not in known]:
            super()._update(wide, group)

    def _update_one(self, param: Tensor, group: dict[str, Any]) -> None:
        state, vectors, (beta1, beta2) = self.local_state(param), group["vectors"], group["betas"]
        weight, gradient = (_rows(each, vectors) for each in (local(param), gradient_of(param)))
        counts = state["step"].add_(1).double().reshape(-1, 1)
        rates, roots = group["lr"] / (1 - beta1**counts), (1 - beta2**counts).sqrt()
        noise = self._noise(param, state, group)
        if noise is not None and vectors == 1 and noise.shard.dim is not None:
            turned = replace(noise.shard, shape=torch.Size(reversed(noise.shard.shape)), dim=1 - noise.shard.dim)
            noise = replace(noise, shard=turned)
        for rows in _lots(weight):
            own = slice(None) if vectors is None else rows  # one count for all, or one for each
            grad = gradient[rows].float()
            first, second = (self._moment(state, key, rows) for key in blockwise.SIGNED)
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            for key, moment in zip(blockwise.SIGNED, (first, second), strict=True):
                codes, scales = blockwise.quantize(moment, blockwise.SIGNED[key])
                state[key][rows].copy_(codes)
                state[f"{key}_absmax"][rows].copy_(scales)
            second.sqrt_().div_(roots[own].float()).add_(group["eps"])
            wide = weight[rows].to(torch.promote_types(weight.dtype, torch.float32))
            if group["weight_decay"]:
                wide = wide * (1 - group["lr"] * group["weight_decay"])
            moved = wide - first.mul_(rates[own].float()).div_(second)
            if noise is None:
                weight[rows].copy_(moved)
            else:
                round_stochastically(weight[rows], moved, noise, rows)

    @staticmethod
    def _moment(state: dict[str, Tensor], key: str, rows: slice) -> Tensor:
        return blockwise.dequantize(state[key][rows], state[f"{key}_absmax"][rows], blockwise.SIGNED[key])


def _rows(matrix: Tensor, vectors: int | None) -> Tensor:
    """A view of a matrix with its vectors as rows."""
    return matrix.T if vectors == 1 else matrix


def _lots(matrix: Tensor) -> Iterator[slice]:
    """Rows that are updated together."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, matrix.shape[1]))
    return (slice(first, min(first + step, len(matrix))) for first in range(0, len(matrix), step))


def _total_blocks(own: int, shard: ShardInfo, device: torch.device) -> int:
    """Blocks of a whole vector of which each device has a part. Raises `ValueError` where devices' parts are so unequal
    that a checkpoint could not say whose a block is."""
    total, devices, largest = (
        int(join(torch.tensor([float(value)], device=device)))
        for join, value in ((shard.sum, own), (shard.sum, 1), (shard.max, own))
    )
    if -(-total // devices) != largest:
        raise ValueError(
            f"adamw8bit: {devices} devices have too unequal parts of vectors of {shard.shape[shard.dim or 0]} numbers: "
            "choose another number of devices"
        )
    return total
