"""`VectorAdamW` with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo, distribute_like, local
from peft_pretraining.optim import vector_batches as batches
from peft_pretraining.optim.state.base import gradient_of
from peft_pretraining.optim.tensors import blockwise
from peft_pretraining.optim.tensors.rounding import Noise, round_stochastically
from peft_pretraining.optim.vector_adamw import VectorAdamW
from peft_pretraining.optim.vector_batches import Matrix

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

    def _by_vectors(self, state: dict[str, Tensor], dim: int) -> list[tuple[Tensor, int]]:
        if state["exp_avg"].dtype != torch.uint8:
            return super()._by_vectors(state, dim)
        return [(state[key], 0) for key in _KEYS]  # with scales of zero they are zero, whatever the bytes are

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        in_8_bits, wide = self._by_form(params)
        states = [self.local_state(param) for param in in_8_bits]
        noises = self._noises(in_8_bits, states, group)
        for param, state, noise in zip(in_8_bits, states, noises, strict=True):
            batches.count([state["step"]], AS_IT_IS)
            self._move_rows(_matrix(param, state, noise, group), group, AS_IT_IS)
        if wide:
            super()._update(wide, group)

    def _update_together(self, params: list[Tensor], group: dict[str, Any], masked: batches.Masked) -> None:
        in_8_bits, wide = self._by_form(params)
        states = [self.local_state(param) for param in in_8_bits]
        noises = self._noises(in_8_bits, states, group)
        batches.count([state["step"] for state in states], masked)
        parts = zip(in_8_bits, states, noises, strict=True)
        matrices = [_matrix(param, state, noise, group) for param, state, noise in parts]
        for lot in batches.alike(matrices, _NUMBERS_AT_ONCE):
            if len(lot) == 1 or group["vectors"] is None:
                for each in lot:
                    self._move_rows(each, group, masked)
            else:
                self._move_lot(lot, group, masked)
        if wide:
            super()._update_together(wide, group, masked)

    def _by_form(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those whose moments are in 8 bits, and the others."""
        forms: tuple[list[Tensor], list[Tensor]] = ([], [])
        for param in params:
            forms[self.state[param]["exp_avg"].dtype != torch.uint8].append(param)
        return forms

    @staticmethod
    def _move_rows(matrix: Matrix, group: dict[str, Any], masked: batches.Masked) -> None:
        """Update one matrix, some of its rows at a time."""
        weight, state = matrix.weight, matrix.state
        rates, roots = (each.view(-1, 1) for each in batches.corrections([state["step"]], group, masked, weight.ndim))
        for rows in _lots(weight):
            own = slice(None) if group["vectors"] is None else rows  # one count for all, or one for each
            kept = {key: state[key][rows] for key in _KEYS}
            moved = _moved(weight[rows], matrix.grad[rows], kept, (rates[own], roots[own]), group, masked)
            if matrix.noise is None:
                weight[rows].copy_(moved)
            else:
                round_stochastically(weight[rows], moved, matrix.noise, rows)

    @staticmethod
    def _move_lot(lot: Sequence[Matrix], group: dict[str, Any], masked: batches.Masked) -> None:
        """Update matrices of one shape, with vectors as rows, as if they lay one below the other."""
        corrections = batches.corrections([each.state["step"] for each in lot], group, masked, 2)
        rates, roots = (each.reshape(-1, 1) for each in corrections)
        kept = {key: torch.cat([each.state[key] for each in lot]) for key in _KEYS}
        weights, shape = [each.weight for each in lot], lot[0].weight.shape
        grads = torch.cat([each.grad for each in lot])
        moved = _moved(torch.cat(weights), grads, kept, (rates, roots), group, masked)
        for key, joined in kept.items():
            torch._foreach_copy_([each.state[key] for each in lot], list(torch.split(joined, shape[0])))
        batches.put(weights, moved.view(len(lot), *shape), [each.noise for each in lot])


AS_IT_IS = batches.Masked()
_KEYS = tuple(name for key in blockwise.SIGNED for name in (key, f"{key}_absmax"))


def _moved(
    weight: Tensor,
    grad: Tensor,
    kept: dict[str, Tensor],
    corrections: tuple[Tensor, Tensor],
    group: dict[str, Any],
    masked: batches.Masked,
) -> Tensor:
    """What rows of a weight become, in float32 at least. Updates their moments, codes and scales of `kept`, in place.

    `corrections` (rows, 1) are those of `vector_batches.corrections`.
    """
    (beta1, beta2), (rates, roots) = group["betas"], corrections
    grad = grad.float()
    first, second = (
        blockwise.dequantize(kept[key], kept[f"{key}_absmax"], signed) for key, signed in blockwise.SIGNED.items()
    )
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    for (key, signed), moment in zip(blockwise.SIGNED.items(), (first, second), strict=True):
        codes, scales = blockwise.quantize(moment, signed)
        kept[key].copy_(masked.or_old(codes, kept[key]))
        kept[f"{key}_absmax"].copy_(masked.or_old(scales, kept[f"{key}_absmax"]))
    second.sqrt_().div_(roots.float()).add_(group["eps"])
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    decayed = wide * (1 - group["lr"] * group["weight_decay"]) if group["weight_decay"] else wide
    return masked.or_old(decayed - first.mul_(rates.float()).div_(second), wide)


def _matrix(param: Tensor, state: dict[str, Tensor], noise: Noise | None, group: dict[str, Any]) -> Matrix:
    """A parameter with its vectors as rows."""
    vectors = group["vectors"]
    if noise is not None and vectors == 1 and noise.shard.dim is not None:
        turned = replace(noise.shard, shape=torch.Size(reversed(noise.shard.shape)), dim=1 - noise.shard.dim)
        noise = replace(noise, shard=turned)
    return Matrix(_rows(local(param), vectors), _rows(gradient_of(param), vectors), state, noise)


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
