"""A check that all ranks hold the same bits, by comparing checksums. Costs one pass over the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_MODULUS = 2**31 - 1
_CHUNK = 2**24
"""Numbers that are summed at once, as 64-bit integers."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_equal_on_all_ranks(layers: Mapping[str, nn.Module], reduce: Callable[[Tensor], Tensor], step: int) -> None:
    """Raises `RuntimeError`, on every rank, naming the first layer whose state differs. `reduce` averages in place."""
    states = {name: list(layer.state_dict().values()) for name, layer in layers.items()}
    device = next((tensor.device for state in states.values() for tensor in state), torch.device("cpu"))
    own = torch.stack([sum(checksum(tensor).to(device) for tensor in state) % _MODULUS for state in states.values()])
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
