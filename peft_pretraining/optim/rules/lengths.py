"""Lengths of the rows or columns of matrices that may be divided over devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.tensors.collectives import Collective, Phases


def norms_along(parts: Sequence[Tensor], shards: Sequence[ShardInfo], axis: int) -> Phases[list[Tensor]]:
    """2-norms over dimension `axis` of matrices (m, n), as (m, 1) or (1, n) of this device's part. Their squares are
    added up over devices where that dimension is divided, for all matrices at once; else nothing crosses."""
    norms = [torch.linalg.vector_norm(part, dim=axis, keepdim=True) for part in parts]
    divided = [place for place, shard in enumerate(shards) if shard.dim == axis]
    squares = yield [Collective(norms[place].square(), shards[place]) for place in divided]
    for place, square in zip(divided, squares, strict=True):
        norms[place] = square.sqrt()
    return norms
