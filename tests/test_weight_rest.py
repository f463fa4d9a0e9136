"""Frozen weights in 16 bits that are corrected again and again: nothing of a correction is lost."""

import sys
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft_pretraining.checkpoint.contents import describe
from peft_pretraining.config import Config
from peft_pretraining.export import merged_model
from peft_pretraining.methods import load_method
from peft_pretraining.nn import LowRankLinear, low_rank_layers, weight_rest
from peft_pretraining.nn.weight_rest import join, split

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.weight_drift import METHODS, drift

EXTREMES = [0.0, -0.0, 1e-40, -1e-40, 1.0 + 2.0**-8, -(1.0 + 2.0**-8), 1.0 + 3 * 2.0**-8, 255.9999, -3e38, 1e-30]


@pytest.mark.parametrize("dtype, relative", [(torch.bfloat16, 2.0**-23), (torch.float16, 2.0**-21)])
def test_a_value_comes_back_from_a_weight_and_its_rest(dtype, relative):
    drawn = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    value = drawn if dtype == torch.float16 else torch.cat([drawn * 1e3, torch.tensor(EXTREMES)])
    weight, rest = torch.empty_like(value, dtype=dtype), torch.empty_like(value, dtype=torch.int16)
    split(value, weight, rest)
    assert torch.equal(weight, value.to(dtype))
    torch.testing.assert_close(join(weight, rest), value, rtol=relative, atol=1e-44)


@pytest.mark.parametrize("name", list(METHODS)[1:])
def test_the_function_does_not_drift_in_bf16(name):
    rounded = drift(METHODS[name], torch.bfloat16, False, size=64, updates=40, lr=1e-3)
    kept = drift(METHODS[name], torch.bfloat16, True, size=64, updates=40, lr=1e-3)
    assert kept < 1e-6 and rounded > 5e-4


def corrected_layer(dtype=torch.bfloat16, corrections=200):
    torch.manual_seed(0)
    linear = nn.Linear(16, 24, bias=False)
    linear.weight.data = linear.weight.data.bfloat16().to(dtype)
    layer = LowRankLinear(linear, 4, 0.5, corrected=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(corrections):
        layer.add_to_weight(1e-4 * torch.randn(24, 16, generator=generator))
    return layer


def test_many_small_corrections_add_up_as_in_float32():
    exact = corrected_layer(torch.float32).weight.detach()
    torch.testing.assert_close(corrected_layer().exact_weight(), exact, rtol=1e-5, atol=1e-7)
    assert torch.equal(corrected_layer().weight, exact.bfloat16())  # products read the nearest one
    assert torch.equal(corrected_layer().merged_weight(), exact.bfloat16())


def test_a_cast_to_more_digits_takes_the_rest_along():
    layer = corrected_layer()
    exact = layer.exact_weight()
    assert torch.equal(layer.float().weight, exact) and layer.rest is None
    half = corrected_layer().to(torch.float16)
    torch.testing.assert_close(half.exact_weight(), exact, rtol=2.0**-20, atol=1e-8)


def test_a_state_dict_has_the_rest_and_older_ones_have_none():
    layer, other = corrected_layer(), corrected_layer(corrections=0)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert state["weight_rest"].dtype == torch.int16
    other.load_state_dict(state)
    assert torch.equal(other.exact_weight(), layer.exact_weight())
    plain = LowRankLinear(nn.Linear(16, 24, bias=False), 4, 0.5)
    plain.load_state_dict(state)
    assert torch.equal(plain.weight, layer.exact_weight())
    del state["weight_rest"]
    other.load_state_dict(state)
    assert torch.equal(other.exact_weight(), layer.weight.float())
    with pytest.raises(RuntimeError, match=r"weight_rest: there is no weight of shape \(2, 2\)"):
        other.load_state_dict({**state, "weight_rest": torch.zeros(2, 2, dtype=torch.int16)})


@pytest.mark.parametrize("dtype, rests", [(torch.bfloat16, True), (torch.float32, False)])
@pytest.mark.parametrize("name", ["lora", "relora", "switchlora", "golore_adapter"])
def test_only_corrected_weights_of_16_bits_have_rests(name, dtype, rests):
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8, dtype=dtype)})
    method = load_method(name)(Config.from_settings({"method": name, "rank": 2, "target_modules": ("mlp",)}))
    model = method.convert(model)
    (layer,) = low_rank_layers(model).values()
    assert (layer.rest is not None) == (rests and name != "lora")
    assert ("mlp.weight_rest" in model.state_dict()) == (layer.rest is not None)


def test_a_bf16_run_resumes_to_the_bit_and_exports_its_rests(command, tmp_path):
    """Its float32 export holds digits that the checkpoint's own bfloat16 export had to round away."""
    flags = {"dtype": "bfloat16", "method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2}
    flags |= {"num_training_steps": 6, "save_every": 3, "eval_every": 6}
    assert helpers.run(command(**flags)) == 0
    resumed = command(**flags, resume_from=tmp_path / "run" / "model_3")
    resumed[resumed.index("--save_dir") + 1] = str(tmp_path / "again")
    assert helpers.run(resumed) == 0
    folders = [tmp_path / name / "model_6" for name in ("run", "again")]
    first, again = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    exact, exact_again = (merged_model(folder, torch.float32).state_dict() for folder in folders)
    assert all(torch.equal(exact[name], exact_again[name]) for name in exact)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exact[name].bfloat16(), first[name]) and not torch.equal(exact[name], first[name].float())


def test_a_bf16_checkpoint_without_rests_can_be_resumed_and_exported(command, tmp_path, monkeypatch):
    flags = {"dtype": "bfloat16", "method": "relora", "rank": 4, "relora": 2, "num_training_steps": 4}
    flags |= {"save_every": 2, "eval_every": 4, "warmup_steps": 0}
    with monkeypatch.context() as patch:
        patch.setattr(weight_rest, "has_rest", lambda dtype: False)  # as older versions wrote it
        assert helpers.run(command(**flags)) == 0
    older = tmp_path / "run" / "model_2"
    assert not any("weight_rest" in name for name in describe(older).state_dict_metadata)
    plain, name = load_file(older / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged_model(older, torch.bfloat16).state_dict()[name], plain[name])
    resumed = command(**flags, resume_from=older)
    resumed[resumed.index("--save_dir") + 1] = str(tmp_path / "again")
    assert helpers.run(resumed) == 0
