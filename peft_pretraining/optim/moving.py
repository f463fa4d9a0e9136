"""The second half of an update: new bases are stored, update rules find directions, lifts move the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_pretraining.distributed.sharding import HALF
from peft_pretraining.optim.basis.subspace import Projected
from peft_pretraining.optim.state.slots import Objects, Slot, keep_changes
from peft_pretraining.optim.tensors.collectives import Phases, in_lots, phases, run, together
from peft_pretraining.optim.tensors.param_update import ParamUpdate

_NUMBERS_AT_ONCE = 2**26
"""Numbers of the matrices that are moved at a time, over all devices: directions, and gradients in another dtype, exist
for so many. Where devices share the weights it is four times as many, and collectives so much rarer."""


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
    divided: bool,
    metrics: dict[str, list[Tensor]],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Moves all weights, those of one group by one call of each of its objects, and the collectives of all groups
    together.

    `members` may be a generator. `divided`: whether devices share the weights. `found_inf` and `grad_scale` are for
    rules that move weights themselves.
    """
    limit = 4 * _NUMBERS_AT_ONCE if divided else _NUMBERS_AT_ONCE
    for lot in in_lots(members, _numbers, limit):
        groups: dict[int, list[Member]] = {}
        for member in lot:
            groups.setdefault(id(member.group), []).append(member)
        run(together([_move_group(group, metrics, found_inf, grad_scale) for group in groups.values()]))


def _numbers(member: Member) -> int:
    """Entries of D, over all devices."""
    return member.slot.numbers


def _move_group(
    members: Sequence[Member], metrics: dict[str, list[Tensor]], found_inf: Tensor | None, grad_scale: Tensor | None
) -> Phases[None]:
    """The update of one group's parameters."""
    objects, group = members[0].slot.objects, members[0].group
    updates = [member.update for member in members]
    if objects.rule.moves_weights:
        objects.rule.move(updates, group, found_inf, grad_scale)
        return
    for member in members:
        _widen(member, objects)
        member.update.state["step"] += 1
        if member.projected and (subspace := member.slot.subspace):
            subspace.apply(member.update.state, member.projected, member.update.step, objects.rule, metrics)
    directions = yield from phases(objects.rule.directions(updates, group))
    for member, direction in zip(members, directions, strict=True):
        member.update.direction = direction
        _narrow(member, objects)
        keep_changes(member.slot, member.param, member.update.state, member.state, group)
    yield from phases(objects.lift.move([update for update in updates if update.direction is not None], group))
    if objects.basis and not objects.basis.refreshes:
        yield from _advance(objects, [member for member in members if _advances(member)], group)


def _widen(member: Member, objects: Objects) -> None:
    """Let the rule see the first moment in the working dtype, where it is kept in fewer digits."""
    key, state = objects.rule.first_moment, member.update.state
    kept = state.get(key)
    if objects.state_format == "weight" and kept is not None and kept.dtype in HALF and member.slot.dtype not in HALF:
        member.narrow, state[key] = kept, kept.to(member.slot.dtype)


def _narrow(member: Member, objects: Objects) -> None:
    """Keep what the rule has made of the first moment."""
    if member.narrow is not None:
        key, state = objects.rule.first_moment, member.update.state
        if key in state:
            state[key] = member.narrow.copy_(state[key])


def _advances(member: Member) -> bool:
    """Whether this parameter's basis moves on: after the first, and where this update has not made it anew."""
    changed = member.projected is not None and member.projected.changes_bases
    return not changed and bool(member.update.state["refreshes"])


def _advance(objects: Objects, members: Sequence[Member], group: dict[str, Any]) -> Phases[None]:
    """Let the basis rule take its own step."""
    assert objects.basis is not None
    if members:
        rate = members[0].update.rate
        pace = rate / _base_rate(group, rate) / group["update_proj_gap"] if rate else 0.0
        yield from phases(objects.basis.advance([member.update for member in members], pace))


def _base_rate(group: dict[str, Any], rate: float) -> float:
    """What a rate is relative to: a scheduler's `initial_lr`, the rate at construction, or, with both 0 (a warm-up by
    hand), the largest so far."""
    if base := float(group.get("initial_lr", group["first_lr"])):
        return base
    group["largest_lr"] = max(group.get("largest_lr", 0.0), rate)
    return float(group["largest_lr"])
