"""A check that all ranks hold the same bits, by comparing checksums. Costs one pass over the tensors.

Of a tensor that is divided over devices the checksum of the whole is the sum over the parts: copies of a divided model
are compared with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import ShardInfo, local

_MODULUS = 2**31 - 1
_CHUNK = 2**24
"""Numbers that are summed at once, as 64-bit integers."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_equal_on_all_ranks(layers: Mapping[str, nn.Module], reduce: Callable[[Tensor], Tensor], step: int) -> None:
    """Raises `RuntimeError`, on every rank, naming the first layer whose state differs. `reduce` averages in place."""
    states = {name: list(layer.state_dict().values()) for name, layer in layers.items()}
    shards = [ShardInfo.of(tensor) for state in states.values() for tensor in state]
    device = next((local(tensor).device for state in states.values() for tensor in state), torch.device("cpu"))
    own, parts = (
        torch.stack([_sum_of_checksums(state, divided, device) for state in states.values()])
        for divided in (False, True)
    )
    if divided := next((shard for shard in shards if shard.dim is not None), None):
        own += divided.sum(parts)
    own %= _MODULUS
    # The sums are integers far below 2^53, so that the mean of equal ones is that number itself.
    own = own.double()
    differs = (reduce(own.clone()) != own).double()
    differs = reduce(differs) > 0  # the same on all ranks
    if differs.any():
        names = list(states)
        which = [names[index] for index in differs.nonzero().flatten().tolist()]
        raise RuntimeError(
            f"before update {step} the ranks differ in {len(which)} of {len(names)} layers, first in {which[0]}: "
            "their gradients or random draws were not equal"
        )


def _sum_of_checksums(tensors: list[Tensor], divided: bool, device: torch.device) -> Tensor:
    """Over those tensors that are divided over devices, of this device's parts, or over the others."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    kept = (tensor for tensor in tensors if (ShardInfo.of(tensor).dim is not None) == divided)
    return sum((checksum(local(tensor)).to(device) for tensor in kept), zero)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A number below 2^31 that depends on every bit and on its place, an int64 scalar on the tensor's device."""
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long() % _MODULUS
        place = torch.arange(start, start + part.numel(), device=part.device) % 65_521 + 1
        total = (total + (part * place % _MODULUS).sum()) % _MODULUS
    return total
