"""Tensors that are divided over devices, here over a single one: what helpers and the factor methods make of them.

On several devices: test_layouts.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_switching import switched_layer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from peft_pretraining.config import Config
from peft_pretraining.distributed import gathering
from peft_pretraining.distributed import sharding as parts
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods.switchlora.method import SwitchLoRA
from peft_pretraining.optim.vector_adamw import VectorAdamW


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def divide(param: torch.Tensor, mesh, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(dim)]), param.requires_grad)


def test_plain_tensors_go_through_and_divided_ones_come_back(mesh):
    plain = torch.randn(6, 4)
    for tensor in (plain.clone(), distribute_tensor(plain, mesh, [Shard(1)])):
        assert torch.equal(gathering.whole(tensor), plain) and torch.equal(gathering.on_main(tensor), plain)
        (columns,) = gathering.gather_columns([plain[:3]], like=tensor)
        assert torch.equal(columns, plain[:3])
        assert torch.equal(gathering.mean_part(plain.clone(), like=tensor), plain)
        gathering.copy_to_shard(tensor, plain + 1)
        assert torch.equal(parts.local(tensor), plain + 1)


def test_divided_pools_share_memory_with_what_is_saved(mesh):
    layer = switched_layer()
    whole = {name: getattr(layer.switching, name).clone() for name in layer.switching.NAMES}
    layer.weight = divide(layer.weight, mesh, 0)
    layer.lora_A, layer.lora_B = divide(layer.lora_A, mesh, 1), divide(layer.lora_B, mesh, 0)
    layer.switching.follow_sharding(layer)
    saved = layer.switching.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(parts.local(saved[name]), tensor)
        assert isinstance(saved[name], DTensor) == name.startswith("candidates")
    parts.local(layer.switching.candidates_A)[0] = 7
    assert (parts.local(saved["candidates_A"])[0] == 7).all()


def test_vectors_that_are_dealt_out_whole_are_refused(mesh):
    """As FSDP2 divides A where the number of inputs is not even: rows on one device each."""
    model = nn.Module()
    model.proj = switched_layer()
    model.proj.lora_A = divide(model.proj.lora_A, mesh, 0)
    with pytest.raises(ConfigError, match="--distributed_type fsdp: switchlora cannot divide the 6 inputs of proj"):
        SwitchLoRA(Config.from_settings({"method": "switchlora"})).build_optimizer(model)
    with pytest.raises(ValueError, match="divided within its vectors"):
        VectorAdamW([{"params": [model.proj.lora_A], "vectors": 0}])
