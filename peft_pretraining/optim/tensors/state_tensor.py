"""What the optimizer's objects keep from one update to the next, declared in one place.

From a declaration follow a tensor's creation at construction, what `load_state_dict` compares, how a checkpoint divides
it over devices, and what it counts in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.tensors.launching import launches_cost


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a parameter's state: this device's part of it, with the value that it begins with."""

    value: Tensor
    dim: int | None = None
    """The dimension along which it is divided over the parameter's devices; None if all have the same."""
    length: int | None = None
    """Entries in that dimension, over all devices."""

    @classmethod
    def like_gradient(cls, value: Tensor, shard: ShardInfo) -> StateTensor:
        """A tensor of the gradient's shape, which is divided as the gradient is."""
        return cls(value) if shard.dim is None else cls(value, shard.dim, shard.shape[shard.dim])

    @classmethod
    def along(cls, value: Tensor, dim: int, shard: ShardInfo) -> StateTensor:
        """A vector with one entry per index of the gradient's dimension `dim`."""
        return cls(value, 0, shard.shape[dim]) if shard.dim == dim else cls(value)


def counter(value: int) -> Tensor:
    """A number that decides what to do: an int64 scalar, which stays on the CPU wherever its weight goes."""
    return torch.full((), value, dtype=torch.int64)


def is_counter(value: Tensor) -> bool:
    """Whether a tensor of the state stays on the CPU."""
    return value.dtype == torch.int64 and value.ndim == 0


def counts(counters: Sequence[Tensor]) -> list[int]:
    """The values of counters, read together."""
    return torch.stack(list(counters)).tolist() if counters else []


def zeros(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of the same shape, contiguous whatever `like` is."""
    return torch.zeros(like.shape, dtype=dtype or like.dtype, device=like.device)


_ALIGNED = 64
"""Numbers at whose multiples tensors begin that lie in one buffer: 128 bytes at least."""


def zeros_like_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous zeros in the shapes of `tensors`: on devices other than the CPU parts of one buffer for each dtype,
    which one launch fills."""
    found: list[Tensor | None] = [None] * len(tensors)
    buffers: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if not launches_cost(tensor.device):
            found[place] = zeros(tensor)
        else:
            buffers.setdefault((tensor.device, tensor.dtype), []).append(place)
    for (device, dtype), places in buffers.items():
        sizes = [-(-tensors[place].numel() // _ALIGNED) * _ALIGNED for place in places]
        parts = torch.split(torch.zeros(sum(sizes), device=device, dtype=dtype), sizes)
        for place, part in zip(places, parts, strict=True):
            found[place] = part[: tensors[place].numel()].view(tensors[place].shape)
    return [tensor for tensor in found if tensor is not None]


STATE_FORMATS = ("published", "weight", "float32", "8bit")
"""How a group's state is kept. `published`: in the weight's dtype, in which all arithmetic is done. `float32`: state
and arithmetic in float32 at least, the weight rounded once an update. `weight`: arithmetic as with `float32`; bases,
and first moments that forget fast enough for it, in the weight's dtype. `8bit`: moments in blocks of 8 bits, where the
update rule has such a form. For weights of 32 bits and more, all but `8bit` are the same."""

FASTEST_FORGOTTEN = 0.95
"""Largest decay of a first moment that the weight's dtype may keep: bfloat16 loses what changes by less than 2^-9."""


def working_dtype(state_format: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of R, D, the bases and the moments of a weight of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if state_format in ("float32", "weight") else dtype


ROUNDINGS = ("nearest", "stochastic")
"""How a weight is rounded that has fewer digits than what it moves by; see `rounding`."""

BASIS_DTYPES = ("auto", "float32", "weight", "int8")
"""How a group's bases are kept. `auto`: as `state_format` says; `int8`: in 8 bits, with a float32 scale for every 256
numbers. They are read in the working dtype."""


def basis_storage(basis_dtype: str, state_format: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that bases of a weight of `dtype` are kept in, from which they are read into the working dtype. `auto`:
    as `state_format` says; `int8`: in 8 bits, with a float32 scale for every 256 numbers."""
    if basis_dtype == "auto":
        basis_dtype = "float32" if state_format == "float32" else "weight"
    if basis_dtype == "int8":
        return torch.int8
    return dtype if basis_dtype == "weight" else torch.promote_types(dtype, torch.float32)
