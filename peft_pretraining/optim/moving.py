"""The second half of an update: new bases are stored, update rules find directions, lifts move the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import HALF
from peft_pretraining.optim.basis.subspace import Projected
from peft_pretraining.optim.state.slots import Objects, Slot, keep_changes
from peft_pretraining.optim.tensors.collectives import Phases, in_lots, phases, run, together
from peft_pretraining.optim.tensors.mask import Mask, count
from peft_pretraining.optim.tensors.param_update import ByRows, ParamUpdate, by_mask
from peft_pretraining.optim.tensors.state_tensor import counts

_NUMBERS_AT_ONCE = 2**26
"""Numbers of the matrices that are moved at a time, over all devices: directions, and gradients in another dtype, exist
for so many. Where launches cost it is twice as many, and where devices share the weights four times, and launches or
collectives so much rarer: activations are gone by then."""


@dataclass
class Member:
    """A parameter on its way through an update."""

    param: Tensor
    slot: Slot
    update: ParamUpdate
    """Its `state` is a copy of the dictionary that follows."""
    state: dict[str, Any]
    group: dict[str, Any]
    projected: Projected | None
    narrow: Tensor | None = None
    """The first moment as it is kept, in fewer digits than the arithmetic has."""


def move(
    members: Iterable[Member],
    lots: int,
    metrics: dict[str, list[Tensor]],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Moves all weights, those of one group by one call of each of its objects, and the collectives of all groups
    together.

    `members` may be a generator. `lots`: how many times `_NUMBERS_AT_ONCE` numbers move at a time. `found_inf` and
    `grad_scale` are for rules that move weights themselves; others heed the updates' masks.
    """
    for lot in in_lots(members, _numbers, lots * _NUMBERS_AT_ONCE):
        groups: dict[int, list[Member]] = {}
        for member in lot:
            groups.setdefault(id(member.group), []).append(member)
        run(together([_move_group(group, metrics, found_inf, grad_scale) for group in groups.values()]))


def _numbers(member: Member) -> int:
    """Entries of D, over all devices; none where the rule makes no copies."""
    return 0 if member.slot.objects.rule.widens else member.slot.numbers


def _move_group(
    members: Sequence[Member], metrics: dict[str, list[Tensor]], found_inf: Tensor | None, grad_scale: Tensor | None
) -> Phases[None]:
    """The update of one group's parameters."""
    objects, group = members[0].slot.objects, members[0].group
    updates = [member.update for member in members]
    if objects.rule.moves_weights:
        for mask, masked in by_mask(updates):
            its = found_inf if mask is None else mask.found_inf(masked[0].weight.device)
            objects.rule.move(masked, group, its, grad_scale)
        return
    _widen(members, objects)
    for mask, masked in by_mask(updates):
        count([update.state["step"] for update in masked], mask)
    for member in members:
        if member.projected and (subspace := member.slot.subspace) and member.projected.changes_bases:
            subspace.apply(member.update.state, member.projected, member.update.step, objects.rule, metrics)
    directions = yield from phases(objects.rule.directions(updates, group))
    for member, direction in zip(members, directions, strict=True):
        if isinstance(direction, ByRows) and not objects.lift.by_rows:
            direction = direction.whole()
        member.update.direction = direction
    for member in members:
        keep_changes(member.slot, member.param, member.update.state, member.state, group, member.update.mask)
    yield from phases(objects.lift.move([update for update in updates if update.direction is not None], group))
    _narrow(members, objects)
    if objects.basis and not objects.basis.refreshes:
        yield from _advance(objects, members, group)


def _widen(members: Sequence[Member], objects: Objects) -> None:
    """Let the rule see first moments in the working dtype, where they are kept in fewer digits."""
    key = objects.rule.first_moment
    if objects.state_format != "weight":
        return
    for member in members:
        kept, dtype = member.update.state.get(key), member.slot.dtype
        if kept is not None and kept.dtype in HALF and dtype not in HALF:
            member.narrow = kept
    narrow = [member for member in members if member.narrow is not None]
    wide = [torch.empty_like(member.update.state[key], dtype=member.slot.dtype) for member in narrow]
    if narrow:
        torch._foreach_copy_(wide, [member.update.state[key] for member in narrow])
    for member, moment in zip(narrow, wide, strict=True):
        member.update.state[key] = moment


def _narrow(members: Sequence[Member], objects: Objects) -> None:
    """Keep what the rule has made of first moments."""
    key = objects.rule.first_moment
    kept = [member for member in members if member.narrow is not None and key in member.update.state]
    if kept:
        narrow = [member.narrow for member in kept if member.narrow is not None]
        torch._foreach_copy_(narrow, [member.update.state[key] for member in kept])
        for member, moment in zip(kept, narrow, strict=True):
            member.update.state[key] = moment


def _advance(objects: Objects, members: Sequence[Member], group: dict[str, Any]) -> Phases[None]:
    """Let the basis rule take its own step: after the first basis, and where this update has not made one anew."""
    assert objects.basis is not None
    known = counts([member.update.state["refreshes"] for member in members])
    updates = [
        member.update
        for member, refreshes in zip(members, known, strict=True)
        if refreshes and not (member.projected and member.projected.changes_bases)
    ]
    if updates:
        rate = updates[0].rate
        pace = rate / _base_rate(group, rate, updates[0].mask) / group["update_proj_gap"] if rate else 0.0
        yield from phases(objects.basis.advance(updates, pace))


def _base_rate(group: dict[str, Any], rate: float, mask: Mask | None) -> float:
    """What a rate is relative to: a scheduler's `initial_lr`, the rate at construction, or, with both 0 (a warm-up by
    hand), the largest so far."""
    if base := float(group.get("initial_lr", group["first_lr"])):
        return base
    before = group.get("largest_lr", 0.0)
    if mask is not None:
        mask.undo(lambda: group.update(largest_lr=before))
    group["largest_lr"] = max(before, rate)
    return float(group["largest_lr"])
