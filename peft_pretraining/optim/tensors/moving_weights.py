"""The weights of a group on their way: decayed, widened and rounded for many at once, where launches cost."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.rounding import NUMBERS_AT_ONCE, round_stack_

_FEWEST, _MOST, _SHARE = 2**24, 2**26, 8
"""Numbers of weights that are widened together: an eighth of those of one shape within these bounds, so that large
models have no more launches than small ones. Float32 copies and the noise are 4 bytes for each."""


class Moving(NamedTuple):
    """A weight to add to, in place, or some rows of one."""

    update: ParamUpdate
    rows: slice | None
    """Which ones; None: all of them."""
    weight: Tensor


def moving_lots(updates: Sequence[ParamUpdate]) -> Iterator[list[Moving]]:
    """As `ParamUpdate.moving_rows`, for many: lots that are to be moved before the next one is asked for. On the CPU
    a weight after the other, while it is in the cache."""
    alike: dict[Hashable, list[ParamUpdate]] = {}
    for update in updates:
        weight, wide = update.weight, update.widened
        if not launches_cost(weight.device):
            for rows, part in update.moving_rows():
                yield [Moving(update, rows, part)]
            continue
        kind = (weight.device, weight.dtype, update.decay, update.decays_first, wide, id(update.mask))
        stacked = () if wide is None else (weight.shape, update.noise and update.noise.shard)
        alike.setdefault((*kind, *stacked), []).append(update)
    for members in alike.values():
        if members[0].widened is not None:
            yield from _widened(members)
            continue
        weights = [update.weight for update in members]
        members[0].decay_(weights, before=True)
        yield [Moving(update, None, update.weight) for update in members]
        members[0].decay_(weights, before=False)


def _widened(updates: Sequence[ParamUpdate]) -> Iterator[list[Moving]]:
    """Of weights of one shape, which are decayed and rounded alike."""
    for members, rows in in_stacks(updates):
        kept = [update.weight if rows is None else update.weight[rows] for update in members]
        wide = torch.stack(kept).to(members[0].widened)
        members[0].decay_([wide], before=True)
        moved = list(wide.unbind())
        yield [Moving(update, rows, part) for update, part in zip(members, moved, strict=True)]
        members[0].decay_([wide], before=False)
        put(members, rows, wide)


def put(updates: Sequence[ParamUpdate], rows: slice | None, wide: Tensor) -> None:
    """Rounds a stack of wide weights, or of `rows` of them, into those of one shape. `wide` is used up."""
    noises = [update.noise for update in updates if update.noise is not None]
    if noises and updates[0].weight.dtype == torch.bfloat16 and wide.numel():
        every = slice(0, wide.shape[1] if wide.ndim > 1 else 1)
        wide = round_stack_(wide.float().contiguous(), noises, rows or every)
    kept = [update.weight if rows is None else update.weight[rows] for update in updates]
    torch._foreach_copy_(kept, list(wide.unbind()))


def in_stacks(updates: Sequence[ParamUpdate]) -> Iterator[tuple[Sequence[ParamUpdate], slice | None]]:
    """Weights of one shape in lots that there is room for; blocks of rows of large ones, None being all rows."""
    weight = updates[0].weight
    numbers, limit = max(1, weight.numel()), NUMBERS_AT_ONCE
    if len(updates) > 1:
        limit = min(max(_FEWEST, len(updates) * numbers // _SHARE), _MOST)
    if numbers <= limit or weight.ndim == 0:
        together = max(1, limit // numbers)
        for start in range(0, len(updates), together):
            yield updates[start : start + together], None
        return
    at_once = max(1, limit // max(1, weight.shape[1:].numel()))
    for update in updates:
        for start in range(0, weight.shape[0], at_once):
            yield [update], slice(start, min(start + at_once, weight.shape[0]))
