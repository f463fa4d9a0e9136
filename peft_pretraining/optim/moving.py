"""The second half of an update: new bases are stored, update rules find directions, lifts move the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_pretraining.optim.collectives import Phases, phases, run, together
from peft_pretraining.optim.param_update import ParamUpdate
from peft_pretraining.optim.slots import Objects, Slot, keep_changes
from peft_pretraining.optim.subspace import Projected

_NUMBERS_AT_ONCE = 2**26
"""Directions that exist at a time, in numbers: more matrices than that are moved one lot after the other."""


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


def move(
    members: Iterable[Member],
    divided: bool,
    metrics: dict[str, list[Tensor]],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Moves all weights, those of one group by one call of each of its objects, and the collectives of all groups
    together. `divided`: whether devices share the weights. `found_inf` and `grad_scale` are for rules that move weights
    themselves."""
    for lot in _lots(members, divided):
        groups: dict[int, list[Member]] = {}
        for member in lot:
            groups.setdefault(id(member.group), []).append(member)
        run(together([_move_group(group, metrics, found_inf, grad_scale) for group in groups.values()]))


def _lots(members: Iterable[Member], divided: bool) -> Iterator[list[Member]]:
    """All at once where devices share the weights, and collectives with them; else as many as memory has room for,
    taken from `members` only then: a member may hold a gradient in another dtype."""
    lot: list[Member] = []
    numbers = 0
    for member in members:
        lot.append(member)
        numbers += member.update.low_rank_grad.numel()
        if numbers >= _NUMBERS_AT_ONCE and not divided:
            yield lot
            lot, numbers = [], 0
    if lot:
        yield lot


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
        member.update.state["step"] += 1
        if member.projected and (subspace := member.slot.subspace):
            subspace.apply(member.update.state, member.projected, member.update.step, objects.rule, metrics)
    directions = yield from phases(objects.rule.directions(updates, group))
    for member, direction in zip(members, directions, strict=True):
        member.update.direction = direction
        keep_changes(member.slot, member.param, member.update.state, member.state, group)
    yield from phases(objects.lift.move([update for update in updates if update.direction is not None], group))
    if objects.basis and not objects.basis.refreshes:
        yield from _advance(objects, [member for member in members if _advances(member)], group)


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
