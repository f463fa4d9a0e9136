"""The linear layer with factors by itself."""

import pytest
import torch
from torch import nn

from peft_pretraining.nn import LowRankLinear, low_rank_layers, merged_state_dict, wrap_linears
from peft_pretraining.nn.quantized import QuantizedWeight

SHAPES = [(24, 16), (16, 24), (16, 16), (1, 8)]


def layer_with_factors(m=24, n=16, rank=4, scale=0.5, dtype=torch.float32, bias=True, **options):
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(n, m, bias=bias, dtype=dtype), rank, scale, **options)
    layer.set_factors(torch.randn_like(layer.lora_A), torch.randn_like(layer.lora_B), keep_function=False)
    return layer


def relative(difference, reference):
    return float(difference.detach().double().abs().max() / reference.detach().double().abs().max())


@pytest.mark.parametrize("m, n", SHAPES)
def test_forward_is_its_formula(m, n):
    layer, x = layer_with_factors(m, n, dtype=torch.float64), torch.randn(3, 5, n, dtype=torch.float64)
    effective = layer.weight + 0.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ effective.T + layer.bias)
    torch.testing.assert_close(layer.merged_weight(), effective.detach())
    assert layer.rank == min(4, m, n)


def test_what_is_trained():
    layer = layer_with_factors(train_scaling=True)
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "bias", "scaling"}
    assert set(layer.state_dict()) == {"weight", *trained}


def test_a_trained_scale_goes_through_tanh():
    layer, x = layer_with_factors(train_scaling=True), torch.randn(5, 16)
    with torch.no_grad():
        layer.scaling.fill_(0.3)
    expected = x @ (layer.weight + layer.scaling.tanh() * layer.lora_B @ layer.lora_A).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.scaling.grad.abs() > 0


def test_dropout_touches_only_the_factors_and_only_in_training():
    layer, x = layer_with_factors(dropout=0.5, bias=False), torch.randn(50, 16)
    frozen = x @ layer.weight.T
    torch.manual_seed(1)
    low = layer(x) - frozen
    assert relative(low - (x @ layer.lora_A.T) @ layer.lora_B.T * 0.5, low) > 0.1
    layer.eval()
    torch.testing.assert_close(layer(x), frozen + (x @ layer.lora_A.T) @ layer.lora_B.T * 0.5)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2**-8)])
def test_merging_changes_the_function_by_rounding_alone(m, n, dtype, bound):
    layer = layer_with_factors(m, n, dtype=dtype)
    before = layer.weight.double() + 0.5 * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    assert layer.lora_B.count_nonzero() == 0 and layer.lora_A.count_nonzero() > 0
    assert relative(layer.weight.double() - before, before) <= bound


def test_a_correction_of_bf16_weights_is_rounded_once():
    layer = layer_with_factors(dtype=torch.bfloat16)
    exact = layer.weight.float() + 0.5 * (layer.lora_B.float() @ layer.lora_A.float())
    layer.merge()
    assert torch.equal(layer.weight, exact.bfloat16())


def test_low_rank_only_has_no_weight():
    layer, x = layer_with_factors(lora_only=True), torch.randn(5, 16)
    torch.testing.assert_close(layer(x), (x @ layer.lora_A.T) @ layer.lora_B.T * 0.5 + layer.bias)
    assert layer.weight is None and "weight" not in layer.state_dict()
    torch.testing.assert_close(layer.merged_weight(), 0.5 * (layer.lora_B @ layer.lora_A).detach())
    with pytest.raises(ValueError, match="lora_only"):
        layer_with_factors(lora_only=True, quantize="4bit")


# The full gradient, gathered beside the ordinary backward pass.


@pytest.mark.parametrize("needs_input_gradient", [True, False])
@pytest.mark.parametrize("m, n", SHAPES)
def test_full_gradient(m, n, needs_input_gradient):
    layer = layer_with_factors(m, n, dtype=torch.float64)
    x, dy = torch.randn(2, 3, 5, n, dtype=torch.float64), torch.randn(2, 3, 5, m, dtype=torch.float64)
    x.requires_grad_(needs_input_gradient)
    plain = nn.Linear(n, m, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(layer.merged_weight())
        plain.bias.copy_(layer.bias)
    layer.full_gradient = torch.zeros(m, n, dtype=torch.float64)
    for inputs, outputs in zip(x, dy, strict=True):  # micro-batches add up
        (layer(inputs) * outputs).sum().backward()
    ours = [p.grad for p in (layer.lora_A, layer.lora_B, layer.bias)]
    input_gradient, full = x.grad, layer.full_gradient
    layer.full_gradient, x.grad = None, None
    layer.zero_grad()
    for inputs, outputs in zip(x, dy, strict=True):
        (plain(inputs) * outputs).sum().backward()
    torch.testing.assert_close(full, plain.weight.grad)
    if needs_input_gradient:
        torch.testing.assert_close(input_gradient, x.grad)
    for inputs, outputs in zip(x.detach(), dy, strict=True):
        (layer(inputs) * outputs).sum().backward()
    for parameter, gradient in zip((layer.lora_A, layer.lora_B, layer.bias), ours, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert layer.weight.grad is None and not layer.weight.requires_grad


def test_full_gradient_under_checkpointing():
    """The recomputed forward pass must not count the gradient twice."""
    from torch.utils.checkpoint import checkpoint

    layer, x = layer_with_factors(), torch.randn(5, 16, requires_grad=True)
    gathered = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.full_gradient = torch.zeros(24, 16)
        call(x).square().sum().backward()
        gathered.append(layer.full_gradient)
    assert torch.equal(*gathered)


# Quantised weights.


@pytest.mark.parametrize("kind, double, bound", [("4bit", False, 0.16), ("4bit", True, 0.17), ("8bit", False, 0.02)])
@pytest.mark.parametrize("m, n", [(24, 16), (64, 128), (7, 5)])
def test_quantised_weight(kind, double, bound, m, n):
    torch.manual_seed(0)
    weight = torch.randn(m, n)
    quantized = QuantizedWeight(weight, kind, double)
    # NF4's widest gap is 0.3 of a block's largest magnitude.
    assert (quantized.dense() - weight).abs().max() < bound * weight.abs().max()
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.numel() == (-(-m * n // 2) if kind == "4bit" else m * n)
    other = torch.randn(m, n)
    quantized.assign(other)
    assert (quantized.dense() - other).abs().max() < bound * other.abs().max()
    again = QuantizedWeight(weight, kind, double)
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(again.dense(), quantized.dense())


@pytest.mark.parametrize("quantize, double", [("4bit", False), ("4bit", True), ("8bit", False)])
def test_a_layer_with_a_quantised_weight(quantize, double):
    layer = layer_with_factors(quantize=quantize, double_quant=double)
    dense, x = layer.dense_weight().clone(), torch.randn(5, 16, requires_grad=True)
    effective = dense + 0.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ effective.T + layer.bias)
    layer(x).square().sum().backward()
    expected = 2 * (x @ effective.T + layer.bias) @ effective
    torch.testing.assert_close(x.grad, expected.detach())
    assert "weight" not in layer.state_dict() and layer.weight is None

    merged = effective.detach()
    layer.merge()  # dequantises, adds in float32, quantises again
    expected = QuantizedWeight(merged, quantize, double).dense()
    torch.testing.assert_close(layer.dense_weight(), expected)
    assert layer.lora_B.count_nonzero() == 0


@pytest.mark.parametrize("options", [{"kind": "3bit"}, {"kind": "8bit", "double_quant": True}])
def test_quantisation_that_does_not_exist(options):
    with pytest.raises(ValueError, match="quantize"):
        QuantizedWeight(torch.zeros(4, 4), **options)


# A model of such layers.


def small_model():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6, bias=False))
    return nn.ModuleDict({"mlp": mlp, "mlp_norm": nn.LayerNorm(6), "head": nn.Linear(6, 3)})


def test_wrapping_and_merging_a_model():
    model, plain = small_model(), small_model()
    layers = wrap_linears(model, ["mlp"], lambda linear, index: LowRankLinear(linear, 2 + index, 0.5))
    assert list(layers) == ["mlp.0", "mlp.2"] and low_rank_layers(model) == layers
    assert [layer.rank for layer in layers.values()] == [2, 3]
    for layer in layers.values():
        layer.set_factors(torch.randn_like(layer.lora_A), torch.randn_like(layer.lora_B), keep_function=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merged_state_dict(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plain.load_state_dict(merged)  # strict: the names are those of the plain model
    x = torch.randn(4, 6)
    torch.testing.assert_close(plain["mlp"](x), model["mlp"](x))
