"""Whole tensors from sharded ones, and parts from whole ones: for what happens once in many updates.

Plain tensors go through as they are. What needs several devices is called by all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from peft_pretraining.distributed.sharding import ShardInfo, distribute_like, local


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered on every device if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_to_shard(tensor: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor: this device's part of them if it is sharded."""
    shard = ShardInfo.of(tensor)
    local(tensor).copy_(shard.part(values, shard.dim or 0))


def meeting(factor: Tensor, matrix: ShardInfo, dim: int) -> Tensor:
    """The entries of a factor that make up this device's part of the product, which is sharded as `matrix` says.

    `dim` is the dimension that the two share: 0 for the left factor (m, r), 1 for the right one (r, n). Gathers the
    factor unless both are sharded along it.
    """
    if ShardInfo.of(factor).dim == dim == matrix.dim:
        return local(factor)
    return matrix.part(whole(factor), dim) if matrix.dim == dim else whole(factor)


def gather_columns(parts: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Whole matrices (k, n) from this device's columns (k, n / devices) of each, with a single collective.

    Columns are sharded over the devices of `like`, evenly.
    """
    shard = ShardInfo.of(like)
    if shard.dim is None:
        return list(parts)
    devices = shard.shape[shard.dim] // shard.size
    flat = torch.cat([part.reshape(-1) for part in parts])
    stacked = whole(distribute_like(flat[None], like, 0, devices))  # (devices, numbers of one device)
    pieces = stacked.split([part.numel() for part in parts], dim=1)
    return [
        piece.reshape(devices, *part.shape).transpose(0, 1).reshape(len(part), devices * part.shape[1])
        for piece, part in zip(pieces, parts, strict=True)
    ]


def mean_part(values: Tensor, like: Tensor) -> Tensor:
    """The mean over the devices of a tensor that each has its own of: the part of it that meets `like`'s."""
    if not isinstance(like, DTensor):
        return values
    mesh = like.device_mesh
    summed = DTensor.from_local(values, mesh, [Partial()] * mesh.ndim, run_check=False)
    return summed.redistribute(placements=like.placements).to_local().div_(mesh.size())


def on_main(tensor: Tensor) -> Tensor:
    """A tensor on the CPU. If it is sharded, whole on the main process and empty on the others, which need none."""
    if not isinstance(tensor, DTensor):
        return tensor.cpu()
    gathered = tensor.full_tensor()
    return gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0, device="cpu")


def gather_to_main(
    tensors: dict[str, Tensor], is_main: bool, same: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU of the main process; an empty mapping on the others. All must call it.

    `same` gives, by name, another name of the same tensor (`tied_names`): it is gathered once, and its two names share
    their memory, as those of a tensor that is not sharded do.
    """
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return tensors if is_main else {}
    same = {name: first for name, first in (same or {}).items() if first in tensors}
    # One at a time: no device has to hold the whole model.
    gathered = {name: on_main(tensor) for name, tensor in tensors.items() if name not in same}
    gathered = {name: gathered[same.get(name, name)] for name in tensors}
    return gathered if is_main else {}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that a model has under several: each with the first one."""
    first: dict[Tensor, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: found for name, param in named if (found := first.setdefault(param, name)) != name}
