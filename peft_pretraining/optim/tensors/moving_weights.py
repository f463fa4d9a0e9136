"""The weights of a group on their way: decayed, widened and rounded for many at once, where launches cost."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from peft_pretraining.optim.tensors.param_update import ParamUpdate


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
        if weight.device.type == "cpu" or update.widened is not None:
            for rows, part in update.moving_rows():
                yield [Moving(update, rows, part)]
        else:
            kind = (weight.device, weight.dtype, update.decay, update.decays_first)
            alike.setdefault(kind, []).append(update)
    for members in alike.values():
        weights = [update.weight for update in members]
        members[0].decay_(weights, before=True)
        yield [Moving(update, None, update.weight) for update in members]
        members[0].decay_(weights, before=False)
