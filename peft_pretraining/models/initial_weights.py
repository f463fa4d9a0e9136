"""Initial weights of a model, as pure functions of (seed, a weight's name).

Each matrix is drawn in float32 on the CPU and then rounded: the same on every device and for every way to distribute
the model. Different matrices are drawn in different threads, a few rows at a time, so that whole matrices in float32
never exist beside the weights, and copying to a device goes on meanwhile.

A rank draws the rows that are other ranks', too: the numbers of a matrix are one sequence of the Mersenne twister, of
which no part is known without what comes before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peft_pretraining import rng
from peft_pretraining.distributed.sharding import ShardInfo, local
from peft_pretraining.runtime.threads import ahead, share_of_cores

WORTH_A_THREAD = 2**20
"""Numbers of a matrix."""
_AT_ONCE = 2**20
"""Numbers that a thread draws before it copies them: 4 MB, which its cache may hold."""
_BLOCK = 16
"""Numbers that torch draws together: what is drawn in multiples of it is the same as what is drawn at once."""


def initialize(params: Mapping[str, nn.Parameter], std: float, seed: int, threads: int | None = None) -> None:
    """Give parameters, by their names in the model, their initial values in place.

    Matrices are drawn from N(0, std²); of the rest biases are 0 and everything else is 1. `threads`: by default those
    that this process's share of the machine's cores allows. On the meta device nothing is drawn.
    """
    matrices = {}
    for name, param in params.items():
        if param.ndim >= 2 and not local(param).is_meta:
            matrices[name] = param.detach()
        else:
            local(param.detach()).fill_(0.0 if name.endswith("bias") else 1.0)
    # The largest first: at the end all threads have something to do.
    order = sorted(matrices, key=lambda name: -matrices[name].numel())
    small = [name for name in order if matrices[name].numel() < WORTH_A_THREAD]
    threads = min(share_of_cores() if threads is None else threads, len(order) - len(small))

    def draw(name: str) -> None:
        _draw(matrices[name], std, rng.generator(seed, f"initial weights of {name}"))

    for _ in ahead(draw, order[: len(order) - len(small)], threads):
        pass
    for _ in ahead(draw, small, 1):
        pass


def _draw(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill this device's part of a matrix."""
    own, shard = local(weight), ShardInfo.of(weight)
    if own is weight and own.device.type == "cpu" and own.dtype == torch.float32 and own.is_contiguous():
        own.normal_(0.0, std, generator=generator)
        return
    dim, first = shard.dim or 0, 0
    for rows in _row_blocks(weight):
        drawn = torch.empty(rows, *weight.shape[1:], dtype=torch.float32).normal_(0.0, std, generator=generator)
        last = first + rows
        if shard.dim is None:
            own[first:last] = drawn.to(own.dtype)
        elif dim:
            own[first:last] = shard.part(drawn, dim).to(own.dtype)
        else:
            begin, end = max(first, shard.offset), min(last, shard.offset + shard.size)
            if begin < end:
                own[begin - shard.offset : end - shard.offset] = drawn[begin - first : end - first].to(own.dtype)
        first = last


def _row_blocks(weight: Tensor) -> Iterator[int]:
    """How many rows are drawn at a time: multiples of a block, but for the last, which is no less than one."""
    rows = len(weight)
    step = max(1, _AT_ONCE // (weight[0].numel() * _BLOCK)) * _BLOCK if weight.numel() else rows
    while rows >= step + _BLOCK:
        yield step
        rows -= step
    if rows:
        yield rows
