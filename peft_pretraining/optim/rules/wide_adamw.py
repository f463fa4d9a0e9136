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
        wide = [[tensor.to(_wide(tensor.dtype)).contiguous() for tensor in tensors] for tensors in kept]
        steps = [piece.update.state["step"] for piece in pieces]
        weights, grads, first, second = (list(tensors) for tensors in zip(*wide, strict=True))
        counts = [step if piece.last else step.clone() for piece, step in zip(pieces, steps, strict=True)]
        self._fused(weights, grads, first, second, counts, group, found_inf, grad_scale)
        for piece, (weight, _, *moments), (moved, _, *new) in zip(pieces, kept, wide, strict=True):
            for moment, value in zip(moments, new, strict=True):
                if value is not moment:
                    moment.copy_(value)
            if moved is weight:
                continue
            if piece.update.noise is None:
                weight.copy_(moved)
            else:
                rounding.round_stochastically(weight, moved, piece.update.noise, piece.rows)


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
