"""torch's fused AdamW for weights that have fewer digits than the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.optim.rules.adamw import TorchAdamW
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors import rounding
from peft_pretraining.optim.tensors.collectives import in_lots
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.param_update import ParamUpdate


@dataclass
class _Piece:
    """Some rows of a weight and of what belongs to it, as they are kept."""

    update: ParamUpdate
    rows: slice
    numbers: int
    last: bool
    """Of its weight: the one with which the count of updates moves on."""

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[self.rows] if tensor.ndim else tensor


class WideTorchAdamW(TorchAdamW):
    """torch's AdamW in float32 at least, decay included, whatever weights, gradients and moments are kept in.

    Float32 copies exist of some rows at a time; each is rounded once. What is in float32 already is moved where it is.
    """

    widens = True

    def in_format(self, state_format: str) -> UpdateRule:
        return self

    def move(
        self,
        updates: Sequence[ParamUpdate],
        group: dict[str, Any],
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        pieces = (piece for update in updates for piece in _pieces(update))
        for lot in in_lots(pieces, lambda piece: piece.numbers, rounding.NUMBERS_AT_ONCE):
            self._move(lot, group, found_inf, grad_scale)

    def _move(
        self, pieces: Sequence[_Piece], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        kept = [_tensors(piece) for piece in pieces]
        wide = _widened(kept)
        steps = [piece.update.state["step"] for piece in pieces]
        weights, grads, first, second = (list(tensors) for tensors in zip(*wide, strict=True))
        counts = [step if piece.last else step.clone() for piece, step in zip(pieces, steps, strict=True)]
        self._fused(weights, grads, first, second, counts, group, found_inf, grad_scale)
        _put_back(pieces, kept, wide)


def _widened(kept: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Contiguous, and in float32 at least; what is so already is the tensor itself."""
    wide = [[_room(tensor) if launches_cost(tensor.device) else _copied(tensor) for tensor in each] for each in kept]
    pairs = [
        (new, tensor)
        for tensors, their in zip(kept, wide, strict=True)
        for tensor, new in zip(tensors, their, strict=True)
        if new is not tensor and launches_cost(tensor.device)
    ]
    if pairs:
        torch._foreach_copy_([new for new, _ in pairs], [tensor for _, tensor in pairs])
    return [[tensor.contiguous() for tensor in tensors] for tensors in wide]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor.dtype))


def _room(tensor: Tensor) -> Tensor:
    """Where the wide copy of a tensor is to go: the tensor itself where it needs none."""
    wide = _wide(tensor.dtype)
    if wide == tensor.dtype:
        return tensor
    return torch.empty_like(tensor, dtype=wide, memory_format=torch.contiguous_format)


def _put_back(pieces: Sequence[_Piece], kept: Sequence[Sequence[Tensor]], wide: Sequence[Sequence[Tensor]]) -> None:
    """Keep weights and moments as they are kept: those that were copied."""
    plain: list[tuple[Tensor, Tensor]] = []
    drawn: list[tuple[Tensor, Tensor, _Piece]] = []
    for piece, (weight, _, *moments), (moved, _, *new) in zip(pieces, kept, wide, strict=True):
        plain += [(moment, value) for moment, value in zip(moments, new, strict=True) if value is not moment]
        if moved is not weight and piece.update.noise is None:
            plain.append((weight, moved))
        elif moved is not weight:
            drawn.append((weight, moved, piece))
    if plain:
        torch._foreach_copy_([target for target, _ in plain], [value for _, value in plain])
    rounding.round_together(
        [weight for weight, _, _ in drawn],
        [moved for _, moved, _ in drawn],
        [noise for _, _, piece in drawn if (noise := piece.update.noise) is not None],
        [piece.rows for _, _, piece in drawn],
    )


def _pieces(update: ParamUpdate) -> Iterator[_Piece]:
    weight = update.weight
    count = weight.shape[0] if weight.ndim else 1
    tensors = (weight, update.low_rank_grad, update.state["exp_avg"], update.state["exp_avg_sq"])
    if all(tensor.dtype == _wide(tensor.dtype) for tensor in tensors):
        yield _Piece(update, slice(0, count), weight.numel(), last=True)
        return
    at_once = rounding.rows_at_once(weight)
    for start in range(0, max(count, 1), at_once):
        rows = slice(start, min(start + at_once, count))
        numbers = (rows.stop - rows.start) * weight.shape[1:].numel()
        yield _Piece(update, rows, numbers, last=rows.stop == count)


def _tensors(piece: _Piece) -> list[Tensor]:
    """Weight, gradient and moments."""
    update = piece.update
    tensors = (update.weight, update.low_rank_grad, update.state["exp_avg"], update.state["exp_avg_sq"])
    return [piece.of(tensor) for tensor in tensors]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
