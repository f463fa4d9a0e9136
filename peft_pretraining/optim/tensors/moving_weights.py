"""The weights of a group on their way: decayed, widened and rounded for many at once, where launches cost."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_pretraining.optim.tensors.collectives import in_lots
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.rounding import NUMBERS_AT_ONCE, round_together, rows_at_once


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
        weight = update.weight
        if not launches_cost(weight.device) or (update.widened is not None and weight.ndim == 0):
            for rows, part in update.moving_rows():
                yield [Moving(update, rows, part)]
        else:
            kind = (weight.device, weight.dtype, update.widened, update.decay, update.decays_first)
            alike.setdefault(kind, []).append(update)
    for members in alike.values():
        if members[0].widened is not None:
            yield from _widened_lots(members)
            continue
        weights = [update.weight for update in members]
        members[0].decay_(weights, before=True)
        yield [Moving(update, None, update.weight) for update in members]
        members[0].decay_(weights, before=False)


def _widened_lots(updates: Sequence[ParamUpdate]) -> Iterator[list[Moving]]:
    """Wide copies of some rows at a time, of several weights where these are small, and rounded together."""
    first, wide = updates[0], updates[0].widened
    pieces = ((update, rows) for update in updates for rows in _blocks(update.weight))
    for lot in in_lots(pieces, lambda piece: _numbers(*piece), NUMBERS_AT_ONCE):
        parts = [update.weight[rows] for update, rows in lot]
        copies = [torch.empty_like(part, dtype=wide, memory_format=torch.contiguous_format) for part in parts]
        torch._foreach_copy_(copies, parts)
        first.decay_(copies, before=True)
        yield [Moving(update, rows, copy) for (update, rows), copy in zip(lot, copies, strict=True)]
        first.decay_(copies, before=False)
        drawn = [place for place, (update, _) in enumerate(lot) if update.noise is not None]
        plain = [place for place, (update, _) in enumerate(lot) if update.noise is None]
        if plain:
            torch._foreach_copy_([parts[place] for place in plain], [copies[place] for place in plain])
        round_together(
            [parts[place] for place in drawn],
            [copies[place] for place in drawn],
            [noise for update, _ in lot if (noise := update.noise) is not None],
            [lot[place][1] for place in drawn],
        )


def _blocks(weight: Tensor) -> Iterator[slice]:
    at_once = rows_at_once(weight)
    return (slice(start, min(start + at_once, len(weight))) for start in range(0, len(weight), at_once))


def _numbers(update: ParamUpdate, rows: slice) -> int:
    numbers: int = (rows.stop - rows.start) * update.weight.shape[1:].numel()
    return numbers
