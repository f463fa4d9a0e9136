"""Numbers that devices have to agree on: asked for with `yield`, and answered for many matrices at once.

The optimizer's objects never call a collective. What needs one is written as a generator: it yields a list of
`Collective`s, is sent the tensors that they come to, in the same order, and returns its result. What needs none is an
ordinary function. `together` advances many of them side by side, so that each phase of an update makes one call for
all of its matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from peft_pretraining.distributed.owners import from_owners, put_together, to_owners
from peft_pretraining.distributed.sharding import ShardInfo

T = TypeVar("T")
Operation: TypeAlias = Literal["sum", "max", "whole", "to_owner", "from_owner"]


class Collective(NamedTuple):
    """A tensor of this device, and what becomes of it over the devices among which `shard` is divided.

    `sum` and `max` are taken entry by entry; `whole` puts the parts of a divided tensor together. `to_owner` does so on
    the `owner`-th of the devices alone, the others get an empty tensor; `from_owner` gives each its part of what the
    owner has, where the others hand in an empty tensor of its dtype. Where `shard` is not divided the tensor itself is
    the answer; but if its team shares the work, `to_owner` is the owner's alone and `from_owner` everybody's.
    """

    part: Tensor
    shard: ShardInfo
    op: Operation = "sum"
    owner: int = 0


Phases: TypeAlias = Generator[list[Collective], list[Tensor], T]
"""A computation with collectives in it."""
Phased: TypeAlias = T | Phases[T]
"""A result, or a computation with collectives in it that ends in one."""


def phases(job: Phased[T]) -> Phases[T]:
    """`job` as a generator, whether it has collectives or not: for `yield from`."""
    if isinstance(job, Generator):
        return (yield from job)
    return job


def together(jobs: Sequence[Phases[T]]) -> Phases[list[T]]:
    """Advances jobs side by side and returns their results: the collectives of each phase are yielded as one list.

    >>> from peft_pretraining.distributed.sharding import WHOLE
    >>> def norm(part):
    ...     (square,) = yield [Collective(part.square().sum(), WHOLE)]
    ...     return float(square.sqrt())
    >>> run(norm(torch.ones(9)))
    3.0
    >>> run(together([norm(torch.tensor([3.0, 4.0])), norm(torch.ones(4))]))
    [5.0, 2.0]
    """
    waiting = dict(enumerate(jobs))
    answers: dict[int, list[Tensor]] = {}
    results: dict[int, T] = {}
    while waiting:
        asked: dict[int, list[Collective]] = {}
        for place, job in list(waiting.items()):
            try:
                asked[place] = job.send(answers[place]) if place in answers else next(job)
            except StopIteration as end:
                results[place] = end.value
                del waiting[place]
        if waiting:
            found = yield [each for asks in asked.values() for each in asks]
            taken = 0
            for place, asks in asked.items():
                answers[place] = found[taken : taken + len(asks)]
                taken += len(asks)
    return [results[place] for place in range(len(jobs))]


def in_turn(jobs: Sequence[Phases[T]], shards: Sequence[ShardInfo]) -> Phases[list[T]]:
    """`together`, where devices divide any of the `shards`; else one job after the other, each while its numbers are
    in the cache."""
    if any(shard.dim is not None for shard in shards):
        return (yield from together(jobs))
    return [run(job) for job in jobs]


def in_lots(items: Iterable[T], numbers: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Consecutive items whose `numbers` add up to `limit`, or just beyond: what memory has room for at a time.

    `items` may be a generator, from which no more is taken before it is asked for. Where collectives follow, `numbers`
    must be the same on all devices.

        >>> list(in_lots([5, 1, 2, 9, 1], lambda number: number, limit=6))
        [[5, 1], [2, 9], [1]]
    """
    lot: list[T] = []
    total = 0
    for item in items:
        lot.append(item)
        total += numbers(item)
        if total >= limit:
            yield lot
            lot, total = [], 0
    if lot:
        yield lot


def run(job: Phases[T]) -> T:
    """The result of a job, with all of its collectives carried out."""
    try:
        asked = next(job)
        while True:
            asked = job.send(_answers(asked))
    except StopIteration as end:
        result: T = end.value
        return result


def _answers(asked: list[Collective]) -> list[Tensor]:
    """One call for each operation, dtype and device: parts are joined, and the result is taken apart again."""
    answers = [each.part for each in asked]
    joined: dict[tuple[str, torch.dtype, torch.device, int], list[int]] = {}
    for place, (part, shard, op, _) in enumerate(asked):
        if shard.dim is None and not (op.endswith("owner") and shard.team.size > 1):
            continue
        joined.setdefault((op, part.dtype, part.device, id(shard.team.group)), []).append(place)
    for (operation, *_), places in joined.items():
        found = _JOINTLY[operation]([asked[place] for place in places])
        for place, answer in zip(places, found, strict=True):
            answers[place] = answer
    return answers


def _reduced(asked: Sequence[Collective]) -> list[Tensor]:
    """`sum` or `max` of tensors of any shapes."""
    flat = torch.cat([each.part.reshape(-1) for each in asked])
    flat = asked[0].shard.sum(flat) if asked[0].op == "sum" else asked[0].shard.max(flat)
    pieces = torch.split(flat, [each.part.numel() for each in asked])
    return [piece.view(each.part.shape) for piece, each in zip(pieces, asked, strict=True)]


_JOINTLY: dict[str, Callable[[Sequence[Collective]], list[Tensor]]] = {
    "sum": _reduced,
    "max": _reduced,
    "whole": lambda asked: put_together([(each.part, each.shard) for each in asked]),
    "to_owner": lambda asked: to_owners([(each.part, each.shard, each.owner) for each in asked]),
    "from_owner": lambda asked: from_owners([(each.part, each.shard, each.owner) for each in asked]),
}
