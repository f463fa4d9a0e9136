"""Distributing a model: one function, `parallelize`, for DDP, FSDP2 and HSDP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn.parallel import DistributedDataParallel

from peft_pretraining.distributed.gloo import one_thread_per_group
from peft_pretraining.distributed.low_rank_reduction import LowRankReduction, reduce_in_its_place
from peft_pretraining.distributed.process_group import ProcessGroup
from peft_pretraining.distributed.wide_sums import WideSums


@dataclass(frozen=True)
class Sharding:
    """FSDP2's settings (arXiv 2304.11277)."""

    replicas: int = 1
    """Copies of the sharded model (HSDP): parameters are sharded over world size / replicas devices."""
    reshard_after_forward: bool = True
    """Free the gathered weights between forward and backward pass."""
    dimension: Callable[[str, Tensor], int | None] = lambda name, param: 0
    """The dimension along which a parameter is sharded, where its size allows; None: every device keeps all of it."""

    compute_dtype: torch.dtype | None = None
    """What weights of decoder layers are cast to when they are gathered; None: they are used as they are. So is the
    rest of the model always: an embedding in fewer digits would add up its gradients in these."""
    apart: Callable[[nn.Module], bool] = lambda module: False
    """Modules whose parameters are used as they are in any case, and may have another dtype than the others: FSDP2
    wants one dtype in what it gathers together."""

    def mesh(self, group: ProcessGroup) -> DeviceMesh:
        shards = group.world_size // self.replicas
        with one_thread_per_group():  # of replicas, and of the shards of one replica
            if self.replicas == 1:
                return init_device_mesh(group.device.type, (shards,), mesh_dim_names=("shard",))
            return init_device_mesh(group.device.type, (self.replicas, shards), mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module,
    group: ProcessGroup,
    sharding: Sharding,
    before: Callable[[str], None] = lambda name: None,
    after: Callable[[nn.Module], None] = lambda module: None,
) -> nn.Module:
    """Shard a model's parameters over the devices, in place: each decoder layer by itself, then the rest.

    before, after: called with the name of each of these modules before, and with the module after it is sharded, so
    that layers can be made one by one and never exist unsharded all at once. The rest is the model, named "".

    Gradients are reduced in float32 (float64 for a float64 model).
    """
    mesh = sharding.mesh(group)
    blocks = model.get_submodule("model.layers")
    layers = {f"model.layers.{name}": layer for name, layer in blocks.named_children()}
    for name, module in (*layers.items(), ("", model)):
        before(name)
        _shard_module(module, name, mesh, group, sharding)
        after(module)
    return model


def _shard_module(module: nn.Module, name: str, mesh: DeviceMesh, group: ProcessGroup, sharding: Sharding) -> None:
    """Shard the parameters of one module, `name` in the model, that are not sharded yet."""
    apart = [each for each in module.modules() if sharding.apart(each) and not isinstance(each, FSDPModule)]
    if apart:
        policy = _policy(next(apart[0].parameters()).dtype)
        fully_shard(apart, mesh=mesh, mp_policy=policy, reshard_after_forward=sharding.reshard_after_forward)
    prefix = f"{name}." if name else ""
    names = {param: prefix + key for key, param in module.named_parameters()}
    devices = group.world_size // sharding.replicas

    def placement(param: nn.Parameter) -> ShardPlacement:
        dim = sharding.dimension(names[param], param)
        assert dim is not None, "replicated parameters are ignored"
        # FSDP2 pads an uneven first dimension, but no other.
        return ShardPlacement(dim if dim == 0 or param.shape[dim] % devices == 0 else 0)

    replicated = {param for param, key in names.items() if sharding.dimension(key, param) is None}
    assert not any(param.requires_grad for param in replicated), "nobody would reduce their gradients"
    for param in replicated:  # FSDP2 moves the others
        param.data = param.data.to(group.device)
    of_apart = {param for each in apart for param in each.parameters()}
    dtype = next(param for param in names if param not in of_apart).dtype
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=_policy(dtype, sharding.compute_dtype if name else None),
        reshard_after_forward=sharding.reshard_after_forward,
        shard_placement_fn=placement,
        ignored_params=replicated,
    )


def _policy(dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> MixedPrecisionPolicy:
    """For weights that are kept in `dtype`: gradients are added up and reduced in float32 at least."""
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.promote_types(dtype, torch.float32))


class Replicated(DistributedDataParallel):
    """DDP, which may leave gradients of micro-batches to float32 sums."""

    wide_sums: WideSums | None = None


class _WithLeaves(nn.Module):
    """A model beside parameters of which it knows nothing, but whose gradients its backward pass makes."""

    def __init__(self, module: nn.Module, leaves: Sequence[nn.Parameter]):
        super().__init__()
        self.module, self.leaves = module, nn.ParameterList(leaves)

    @property
    def fused_loss(self) -> bool:
        """What the loss asks the module inside DDP (models/loss.py)."""
        return bool(getattr(self.module, "fused_loss", False))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def parallelize(
    model: nn.Module,
    group: ProcessGroup,
    low_rank: LowRankReduction | None = None,
    wide_sums: bool = False,
    leaves: Mapping[nn.Parameter, nn.Parameter] = MappingProxyType({}),
) -> nn.Module:
    """The module whose forward pass trains `model` on all processes.

    `model` itself where nothing is distributed, and when it is sharded.

    With `low_rank`, DDP reduces projected gradients; with `wide_sums`, it adds up and averages those of 16-bit weights
    in float32.

    `leaves`: weights that have no gradients -> parameters without memory whose gradients are averaged in their place.
    """
    if not group.is_collective or isinstance(model, FSDPModule):
        return model
    with _leaves_in_place(leaves):
        device_ids = [group.device.index] if group.device.type == "cuda" else None
        module = _WithLeaves(model, list(leaves.values())) if leaves else model
        parallel = Replicated(module, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    if wide_sums:
        parallel.wide_sums = WideSums(model.parameters())
    if low_rank is not None or wide_sums:
        reduce_in_its_place(parallel, low_rank, parallel.wide_sums)
    return parallel


@contextlib.contextmanager
def _leaves_in_place(leaves: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """While DDP looks which parameters there are, and makes those of all ranks equal: that needs memory."""
    for weight, leaf in leaves.items():
        weight.requires_grad_(False)
        leaf.data = torch.zeros_like(leaf, memory_format=torch.contiguous_format)
    yield
    for weight, leaf in leaves.items():
        weight.requires_grad_(True)
        leaf.data = leaf.data.new_zeros(()).expand(leaf.shape)


def free_gathered_weights(model: nn.Module) -> None:
    """After forward passes without a backward pass: with `reshard_after_forward` off, that alone would free them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def synchronised_backward(parallel_model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Reduce gradients over the processes in this backward pass, or (`now=False`) only accumulate them here."""
    if isinstance(parallel_model, FSDPModule):
        parallel_model.set_requires_gradient_sync(now)
    elif not now and isinstance(parallel_model, Replicated):
        return _alone(parallel_model)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _alone(parallel_model: Replicated) -> Iterator[None]:
    """Accumulate gradients in this process."""
    with parallel_model.no_sync():
        yield
    if parallel_model.wide_sums is not None:
        parallel_model.wide_sums.take()
