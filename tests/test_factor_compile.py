"""Layers with factors are traced as one graph, so that a decoder layer can be compiled as a whole."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from peft_pretraining.config import Config
from peft_pretraining.methods import load_method

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32, "num_hidden_layers": 1}
SLOW = pytest.mark.slow
METHODS = {"lora": {}, "switchlora": {"init_lora_type": "switchlora"}, "golore_adapter": {}}


@pytest.mark.parametrize("method", ["switchlora", *(pytest.param(m, marks=SLOW) for m in ("lora", "golore_adapter"))])
def test_a_decoder_layer_is_one_graph(method):
    torch.manual_seed(0)
    shape = LlamaConfig(**SIZES, attn_implementation="sdpa")
    layer = LlamaDecoderLayer(shape, layer_idx=0).double()
    settings = {"method": method, "rank": 4, "num_training_steps": 10, **METHODS[method]}
    layer = load_method(method)(Config.from_settings(settings)).convert(layer)
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    positions = torch.arange(8)[None]
    rotary = LlamaRotaryEmbedding(shape).double()(x, positions)

    def gradients(forward):
        inputs = x.clone().requires_grad_()
        out = forward(inputs, position_embeddings=rotary, position_ids=positions, attention_mask=None)
        trained = [param for param in layer.parameters() if param.requires_grad]
        return torch.autograd.grad(out.square().sum(), [inputs, *trained], allow_unused=True)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for one, other in zip(gradients(layer), gradients(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
