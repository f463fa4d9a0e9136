"""Building a model never holds it whole beside its replacement, nor more of it than a device's part and one layer."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.config import Config
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.distributed.sharding import local
from peft_pretraining.methods import load_method
from peft_pretraining.training.build_model import distributed_model

HIDDEN, INNER, LAYERS, VOCABULARY = 64, 128, 8, 32
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}
DECODER_LAYER = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
"""Bytes of the matrices of one, in float32."""
LINEAR = 4 * HIDDEN * INNER
CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made while it is active, and still live."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device == CPU:
                self.add(local(tensor).untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget():
            self.live.discard(key)
            self.now -= size

        weakref.finalize(storage, forget)


def built(method, group, **settings):
    """The model, and the bytes that were live at most, beyond its own."""
    settings = {"rank": 4, "lora_alpha": 4.0, "dtype": "float32", **settings}
    config = Config.from_settings({"method": method, **settings})
    with LiveBytes() as counted:
        model = distributed_model(config, SHAPE, load_method(method)(config), group)
    return model, counted.peak - counted.now, counted.now


@pytest.fixture
def four_ranks():
    """This process as the first of four, whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield ProcessGroup(0, 4, 0, 4, CPU)
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", [{"lora_only": True}, {"quantize": "8bit"}, {"quantize": "4bit"}], ids=str)
def test_weights_that_are_replaced_live_one_at_a_time(settings):
    _, more, own = built("lora", ProcessGroup(0, 1, 0, 1, CPU), **settings)
    assert own < LAYERS * DECODER_LAYER / 2
    assert more < 6 * LINEAR  # the weight, its product of factors, and what quantising it in float32 takes


@pytest.mark.parametrize("method", ["lora", "relora", "switchlora", "golore_adapter", "full_rank"])
def test_a_rank_makes_its_part_of_the_model_and_one_decoder_layer(method, four_ranks):
    model, more, own = built(method, four_ranks, distributed_type="fsdp")
    assert sum(local(param).numel() for param in model.parameters()) < sum(p.numel() for p in model.parameters()) / 3
    pools = 4 * 7 * HIDDEN * 4 * HIDDEN if method == "switchlora" else 0
    assert more < DECODER_LAYER + pools + 4 * LINEAR
    assert own < (LAYERS * DECODER_LAYER + LAYERS * pools) / 3
