"""How one tensor's share on this device relates to the whole: all that the rest of the package knows of DTensors.

Optimizers do their arithmetic on local tensors. Where a sum over a sharded dimension is needed, they ask the tensor's
`ShardInfo`; without sharding that is the identity. A rule never asks which rank it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from peft_pretraining.distributed.team import ALONE, Team


def local(tensor: Tensor) -> Tensor:
    """This device's part of a tensor, sharing its memory; the tensor itself when it is not distributed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class ShardInfo:
    """This device holds entries `offset` to `offset + size` of dimension `dim` of a tensor of `shape`.

    `dim` None: it holds everything.
    """

    shape: torch.Size
    dim: int | None = None
    offset: int = 0
    size: int = 0
    along: int = 0
    """The dimension in which tensors like this are sharded when there are several devices."""
    sum: Callable[[Tensor], Tensor] = field(default=_itself, compare=False)
    """Adds up a tensor over the devices that hold the other parts, in place."""
    max: Callable[[Tensor], Tensor] = field(default=_itself, compare=False)
    """The largest over these devices, entry by entry, in place."""
    gather: Callable[[Tensor], Tensor] = field(default=_itself, compare=False)
    """The whole tensor, on every device, from the local part of one like it."""
    team: Team = field(default=ALONE, compare=False)
    """The devices that hold the other parts; of a tensor that is not divided those that have the same and share the
    work on it, if there are any (`shared`)."""

    @classmethod
    def of(cls, tensor: Tensor) -> ShardInfo:
        """That of a parameter or a gradient: DTensors are sharded along one dimension, perhaps with replicas."""
        if not isinstance(tensor, DTensor):
            return cls(tensor.shape)
        mesh, placements = tensor.device_mesh, tensor.placements
        sharded = [
            (axis, placement.dim) for axis, placement in enumerate(placements) if isinstance(placement, ShardPlacement)
        ]
        if not sharded:
            return cls(tensor.shape)
        ((axis, dim),) = sharded
        group = mesh.get_group(axis)
        shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)

        def add_up(part: Tensor) -> Tensor:
            dist.all_reduce(part, group=group)
            return part

        def largest(part: Tensor) -> Tensor:
            dist.all_reduce(part, dist.ReduceOp.MAX, group=group)
            return part

        def gather(part: Tensor) -> Tensor:
            return _like(part, tensor, dim, tensor.shape).full_tensor()

        return cls(tensor.shape, dim, offsets[dim], shape[dim], dim, add_up, largest, gather, Team.of(group))

    def shared(self) -> ShardInfo:
        """As it is, but of something that all devices of the run have, where each does a part of what is to be done."""
        return self if self.dim is not None else replace(self, team=Team.of_all())

    def of_shape(self, shape: Sequence[int]) -> ShardInfo:
        """That of a tensor of another shape which the same devices divide by rows, as torch does, or have whole."""
        if self.dim is None:
            return replace(self, shape=torch.Size(shape))
        other = replace(self, shape=torch.Size(shape), dim=0, along=0, gather=_itself)
        offset, size = other.part_of(self.team.place)
        return replace(other, offset=offset, size=size)

    def part_of(self, place: int) -> tuple[int, int]:
        """Offset and size of what the `place`-th device of the team holds of dimension `dim`."""
        assert self.dim is not None
        length = self.shape[self.dim]
        most = -(-length // self.team.size)
        offset = min(place * most, length)
        return offset, min(most, length - offset)

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """The entries of a whole tensor's dimension `dim` that belong to this device, as a view."""
        return whole if self.dim is None else whole.narrow(dim, self.offset, self.size)

    def on_all_ranks(self, condition: Tensor) -> bool:
        """Whether a boolean scalar holds on all devices that share the tensor."""
        return bool(self.sum((~condition).to(torch.float32)) == 0)


WHOLE = ShardInfo(torch.Size())
"""Of tensors that are not sharded, where nobody asks for the shape."""


def distribute_like(part: Tensor, param: Tensor, dim: int | None, length: int | None = None) -> Tensor:
    """Optimizer state as a checkpoint must see it: a DTensor over the parameter's devices.

    `part` is sharded along its dimension `dim`, of `length` entries in all, or is the same on all ranks (None).
    """
    if not isinstance(param, DTensor) or dim is None:
        return part
    assert length is not None, "the length of a sharded dimension is not that of the part"
    shape = torch.Size((*part.shape[:dim], length, *part.shape[dim + 1 :]))
    return _like(part, param, dim, shape)


def _like(part: Tensor, param: DTensor, dim: int, shape: torch.Size) -> DTensor:
    placements = [
        ShardPlacement(dim) if isinstance(placement, ShardPlacement) else Replicate() for placement in param.placements
    ]
    stride = torch.empty(shape, device="meta").stride()
    # Not `DTensor.from_local`, which would copy what lies in host memory (candidate pools) to the mesh's device.
    spec = DTensorSpec(param.device_mesh, tuple(placements), tensor_meta=TensorMeta(shape, stride, part.dtype))
    return DTensor(part.contiguous(), spec, requires_grad=False)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm over all entries of plain tensors and DTensors, a plain scalar."""
    tensors = list(tensors)
    return whole_norm([(local(tensor), ShardInfo.of(tensor)) for tensor in tensors])


def whole_norm(parts: Iterable[tuple[Tensor, ShardInfo]]) -> Tensor:
    """The 2-norm over local parts, in float32 at least; those that are sharded are added up over their devices, all at
    once."""
    parts = list(parts)
    if not parts:
        return torch.zeros(())
    plain = [part for part, shard in parts if shard.dim is None]
    sharded = [(part, shard) for part, shard in parts if shard.dim is not None]
    if not sharded:
        return _norm_of_parts(plain)
    square = _norm_of_parts([part for part, _ in sharded]).square()
    square = sharded[0][1].sum(square)
    if plain:
        square = square + _norm_of_parts(plain).square()
    return square.sqrt()


def each_norm(parts: Sequence[tuple[Tensor, ShardInfo]]) -> Tensor:
    """The 2-norm of each of some local parts, as `whole_norm` of one alone: (number of parts,), with one collective for
    all that are sharded. Their dtypes may differ in what float32 does not hold."""
    norms = _norms([part for part, _ in parts])
    divided = [place for place, (_, shard) in enumerate(parts) if shard.dim is not None]
    if divided:
        sum_over_devices = parts[divided[0]][1].sum
        whole = sum_over_devices(torch.stack([norms[place] for place in divided]).square()).sqrt()
        for place, norm in zip(divided, whole.unbind(), strict=True):
            norms[place] = norm
    return torch.stack(norms)


def _norms(parts: list[Tensor]) -> list[Tensor]:
    """Of each part by itself, in float32 at least."""
    kinds: dict[torch.dtype, list[int]] = {}
    for place, part in enumerate(parts):
        kinds.setdefault(part.dtype, []).append(place)
    found: dict[int, Tensor] = {}
    for dtype, places in kinds.items():
        alike = [parts[place] for place in places]
        norms = torch._foreach_norm(alike, 2.0, torch.float32) if dtype in HALF else torch._foreach_norm(alike, 2.0)
        found.update(zip(places, norms, strict=True))
    return [found[place] for place in range(len(parts))]


HALF = (torch.bfloat16, torch.float16)
"""Dtypes in which sums are not to be formed."""


def _norm_of_parts(parts: list[Tensor]) -> Tensor:
    """torch's total norm; with parts of 16 bits among them not rounded to these, neither in part nor as a whole."""
    half = [part for part in parts if part.dtype in HALF]
    if not half:
        return torch.nn.utils.get_total_norm(parts, foreach=True)
    norms = list(torch._foreach_norm(half, 2.0, torch.float32))
    if wide := [part for part in parts if part.dtype not in HALF]:
        norms.append(torch.nn.utils.get_total_norm(wide, foreach=True).to(norms[0].device))
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total
