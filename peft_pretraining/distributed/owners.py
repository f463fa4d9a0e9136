"""Matrices on their way to the devices that do the work that needs them whole, and back: many by one collective.

All devices of a team call these with the same matrices, in the same order, of one dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo

Owned: TypeAlias = tuple[Tensor, ShardInfo, int]
"""A tensor of this device, how the whole is divided, and the place of its owner in the team."""


def put_together(parts: Sequence[tuple[Tensor, ShardInfo]]) -> list[Tensor]:
    """The whole of each divided tensor, on every device."""
    team = parts[0][1].team
    flat = torch.cat([part.reshape(-1) for part, _ in parts])
    shards = [shard for _, shard in parts]
    sizes = [sum(_numbers(shard, place) for shard in shards) for place in range(team.size)]
    return _assembled(team.gather(flat, sizes), shards)


def to_owners(parts: Sequence[Owned]) -> list[Tensor]:
    """The whole of each tensor on its owner, an empty tensor elsewhere."""
    team = parts[0][1].team
    nothing = parts[0][0].new_empty(0)
    found = [part if owner == team.place else nothing for part, _, owner in parts]
    divided = [place for place, (_, shard, _) in enumerate(parts) if shard.dim is not None]
    if not divided:
        return found
    sent: list[list[Tensor]] = [[nothing] for _ in range(team.size)]
    for place in divided:
        part, _, owner = parts[place]
        sent[owner].append(part.reshape(-1))
    own = [place for place in divided if parts[place][2] == team.place]
    shards = [parts[place][1] for place in own]
    sizes = [sum(_numbers(shard, place) for shard in shards) for place in range(team.size)]
    received = team.exchange([torch.cat(each) for each in sent], sizes)
    for place, whole in zip(own, _assembled(received, shards), strict=True):
        found[place] = whole
    return found


def from_owners(wholes: Sequence[Owned]) -> list[Tensor]:
    """This device's part of what the owner of each tensor has; all of it where it is not divided."""
    found: list[Tensor | None] = [None] * len(wholes)
    for divided, move in ((True, _parts_from), (False, _copies_from)):
        places = [place for place, (_, shard, _) in enumerate(wholes) if (shard.dim is not None) == divided]
        if places:
            for place, each in zip(places, move([wholes[place] for place in places]), strict=True):
                found[place] = each
    return [each for each in found if each is not None]


def _parts_from(wholes: Sequence[Owned]) -> list[Tensor]:
    team = wholes[0][1].team
    nothing = wholes[0][0].new_empty(0)
    sent: list[list[Tensor]] = [[nothing] for _ in range(team.size)]
    for whole, shard, owner in wholes:
        if owner == team.place:
            for place, pieces in enumerate(sent):
                pieces.append(_piece(whole, shard, place).reshape(-1))
    shards = [[shard for _, shard, owner in wholes if owner == place] for place in range(team.size)]
    sizes = [sum(_numbers(shard, team.place) for shard in each) for each in shards]
    received = team.exchange([torch.cat(each) for each in sent], sizes)
    return _in_turn(wholes, received, [_shape(shard, team.place) for _, shard, _ in wholes])


def _copies_from(wholes: Sequence[Owned]) -> list[Tensor]:
    team = wholes[0][1].team
    own = [whole.reshape(-1) for whole, _, owner in wholes if owner == team.place]
    flat = torch.cat(own) if own else wholes[0][0].new_empty(0)
    sizes = [sum(shard.shape.numel() for _, shard, owner in wholes if owner == place) for place in range(team.size)]
    return _in_turn(wholes, team.gather(flat, sizes), [tuple(shard.shape) for _, shard, _ in wholes])


def _in_turn(wholes: Sequence[Owned], received: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """What owners have sent, one tensor of each after the other, in the order of the tensors."""
    taken, found = [0] * len(received), []
    for (_, _, owner), shape in zip(wholes, shapes, strict=True):
        numbers = math.prod(shape)
        found.append(received[owner].narrow(0, taken[owner], numbers).view(tuple(shape)))
        taken[owner] += numbers
    return found


def _assembled(received: Sequence[Tensor], shards: Sequence[ShardInfo]) -> list[Tensor]:
    """Whole tensors, of what each device has sent: its part of one after the other."""
    taken, found = [0] * len(received), []
    for shard in shards:
        pieces = []
        for place, flat in enumerate(received):
            shape = _shape(shard, place)
            pieces.append(flat.narrow(0, taken[place], math.prod(shape)).view(shape))
            taken[place] += math.prod(shape)
        assert shard.dim is not None
        found.append(torch.cat(pieces, shard.dim))
    return found


def _piece(whole: Tensor, shard: ShardInfo, place: int) -> Tensor:
    assert shard.dim is not None
    return whole.narrow(shard.dim, *shard.part_of(place))


def _shape(shard: ShardInfo, place: int) -> tuple[int, ...]:
    """Of the `place`-th device's part."""
    assert shard.dim is not None
    shape = list(shard.shape)
    shape[shard.dim] = shard.part_of(place)[1]
    return tuple(shape)


def _numbers(shard: ShardInfo, place: int) -> int:
    return math.prod(_shape(shard, place))
