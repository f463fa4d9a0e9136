"""What keeps less for the backward pass computes what transformers' layers compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from peft_pretraining.config.sections import ModelConfig
from peft_pretraining.models.compute_dtype import RMSNorm, compute_in
from peft_pretraining.models.lean_functions import GatedLinear, GatedProduct, Norm
from peft_pretraining.models.llama import build_model
from peft_pretraining.training.device_settings import lean_or_not

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "hidden_act": "silu"}


def test_gradients_are_those_of_the_function():
    torch.manual_seed(0)
    x, gate, up = (torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: Norm.apply(x, weight, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(GatedProduct.apply, (gate, up))
    matrix = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GatedLinear.apply, (gate, up, matrix))


def layers():
    torch.manual_seed(1)
    norm, mlp = LlamaRMSNorm(32), LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48))
    with torch.no_grad():
        norm.weight.normal_(1, 0.1)
    return torch.nn.ModuleDict({"norm": norm, "mlp": mlp.bfloat16()})


def outcome(model):
    """Output and gradients for the same input; bf16 activations."""
    torch.manual_seed(2)
    x = torch.randn(4, 6, 32).bfloat16().requires_grad_()
    out = model["mlp"](model["norm"](x).to(x.dtype))
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), x.grad, *(param.grad for param in model.parameters())]


def test_layers_agree_with_those_of_transformers():
    theirs, ours = layers(), layers()
    compute_in(ours, torch.bfloat16)
    assert type(ours["mlp"]) is not LlamaMLP and type(ours["norm"]) is not LlamaRMSNorm
    expected, found = outcome(theirs), outcome(ours)
    assert torch.equal(expected[0], found[0])
    for one, other in zip(expected[1:], found[1:], strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= 2**-8 * one.float().norm()


def test_an_mlp_with_another_activation_is_left_alone():
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=8, hidden_act="gelu"))
    compute_in(mlp, torch.bfloat16)
    assert type(mlp) is LlamaMLP


def kept_bytes(act, x):
    """Bytes that autograd keeps, beside inputs and weights."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        act(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_a_norm_keeps_next_to_nothing():
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    norm = LlamaRMSNorm(256)
    before = kept_bytes(norm, x)
    compute_in(norm, torch.bfloat16)
    assert kept_bytes(norm, x) < 0.1 * before


def test_a_gated_product_keeps_its_inputs_alone():
    gate, up = (torch.randn(64, 256).bfloat16().requires_grad_() for _ in range(2))
    product = GatedProduct.apply(gate, up)
    assert torch.equal(product, F.silu(gate) * up)
    assert {id(each) for each in product.grad_fn.saved_tensors} <= {id(gate), id(up)}


def test_runs_in_one_dtype_take_lean_layers_where_they_are_asked_for():
    """Left open, on CUDA alone: the CPU goes on with transformers' modules."""
    assert [lean_or_not("auto", device) for device in ("cuda", "cpu")] == ["on", "off"]
    assert [lean_or_not("off", "cuda"), lean_or_not("on", "cpu")] == ["off", "on"]
    shape = {**SIZES, "num_hidden_layers": 1, "vocab_size": 64}
    ids, losses = torch.tensor([[1, 2, 3, 4]]), []
    for lean, is_norm in (("off", LlamaRMSNorm), ("on", RMSNorm)):
        config = ModelConfig(dtype="float32", lean_layers=lean)
        model = build_model(config, shape, None, torch.device("cpu"), seed=1)
        assert type(model.model.norm) is is_norm and (type(model.model.layers[0].mlp) is LlamaMLP) == (lean == "off")
        losses.append(model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(losses[0], losses[1])
