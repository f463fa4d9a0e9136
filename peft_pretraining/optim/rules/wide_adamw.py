"""torch's fused AdamW for weights that have fewer digits than the arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.optim.rules.torch_adamw import TorchAdamW
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors import moving_weights, rounding
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
        together = [update for update in updates if launches_cost(update.weight.device)]
        for members in _alike(together):
            self._move_together(members, group, found_inf, grad_scale)
        apart = (update for update in updates if not launches_cost(update.weight.device))
        pieces = (piece for update in apart for piece in _pieces(update))
        for lot in in_lots(pieces, lambda piece: piece.numbers, rounding.NUMBERS_AT_ONCE):
            self._move(lot, group, found_inf, grad_scale)

    def _move_together(
        self, updates: Sequence[ParamUpdate], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        """Move weights of one shape and kind, or what needs no widening."""
        if _is_wide(updates[0]):
            lists = zip(*([update.weight, *_others(update)] for update in updates), strict=True)
            weights, grads, first, second = (list(tensors) for tensors in lists)
            steps = [update.state["step"] for update in updates]
            self._fused(weights, grads, first, second, steps, group, found_inf, grad_scale)
            return
        for members, rows in moving_weights.in_stacks(updates):
            last = rows is None or rows.stop == members[0].weight.shape[0]
            steps = [update.state["step"] for update in members]
            counts = steps if last else [step.clone() for step in steps]
            columns = list(zip(*([update.weight, *_others(update)] for update in members), strict=True))
            kept = [[each if rows is None else each[rows] for each in column] for column in columns]
            stacks = [torch.stack(column).to(_wide(column[0].dtype)) for column in kept]
            weights, grads, first, second = (list(stack.unbind()) for stack in stacks)
            self._fused(weights, grads, first, second, counts, group, found_inf, grad_scale)
            torch._foreach_copy_(kept[2] + kept[3], first + second)
            wide = stacks[0]
            del stacks, grads, first, second  # before there is noise beside the weights
            moving_weights.put(members, rows, wide)

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


def _others(update: ParamUpdate) -> list[Tensor]:
    """Gradient and moments."""
    return [update.low_rank_grad, update.state["exp_avg"], update.state["exp_avg_sq"]]


def _is_wide(update: ParamUpdate) -> bool:
    return all(tensor.dtype == _wide(tensor.dtype) for tensor in (update.weight, *_others(update)))


def _alike(updates: Sequence[ParamUpdate]) -> list[list[ParamUpdate]]:
    """Those that are moved together."""
    found: dict[Hashable, list[ParamUpdate]] = {}
    for update in updates:
        kind: Hashable = (update.weight.device, update.weight.dtype)
        if not _is_wide(update):
            dtypes = tuple(tensor.dtype for tensor in _others(update))
            kind = (kind, dtypes, update.weight.shape, update.noise and update.noise.shard)
        found.setdefault(kind, []).append(update)
    return list(found.values())


def _pieces(update: ParamUpdate) -> Iterator[_Piece]:
    weight = update.weight
    count = weight.shape[0] if weight.ndim else 1
    if _is_wide(update):
        yield _Piece(update, slice(0, count), weight.numel(), last=True)
        return
    at_once = rounding.rows_at_once(weight)
    for start in range(0, max(count, 1), at_once):
        rows = slice(start, min(start + at_once, count))
        numbers = (rows.stop - rows.start) * weight.shape[1:].numel()
        yield _Piece(update, rows, numbers, last=rows.stop == count)


def _tensors(piece: _Piece) -> list[Tensor]:
    """Weight, gradient and moments."""
    return [piece.of(tensor) for tensor in (piece.update.weight, *_others(piece.update))]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
