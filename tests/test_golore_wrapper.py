"""The wrapper for other people's training loops, against the trainer."""

import json
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from conftest import BLOCK
from torch import nn
from transformers import AutoModelForCausalLM

from peft_pretraining.config import ModelConfig, ScheduleConfig
from peft_pretraining.config.schedule import rate_multiplier
from peft_pretraining.data.blocks import SampleOrder, TokenBlocks
from peft_pretraining.GoLore import ReLoRaLinear, ReLoRaModel
from peft_pretraining.models.llama import build_model
from peft_pretraining.optim import LowRankOptimizer


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_a_loop_by_hand_gets_the_trainers_weights(command, data_dir, model_json, tmp_path, rule):
    flags = {"optimizer": rule, "rank": 4, "scale": 0.5, "update_proj_gap": 5, "rand_ratio": 0.5, "clip_grad_norm": 0}
    argv = [*command(**flags, use_peft="True", total_batch_size=8, lr=1e-2 if rule == "adamw" else 0.1), "--Golore"]
    assert helpers.run(argv) == 0

    model = build_model(ModelConfig(), json.loads(model_json.read_text()), None, torch.device("cpu"), seed=42)
    model = ReLoRaModel(
        model, r=4, lora_dropout=0, target_modules=["attn", "attention", "mlp"], scale=0.5,
        keep_original_weights=True, lora_only=False, quantize=None, use_double_quant=False,
    )  # fmt: skip
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = 1e-2 if rule == "adamw" else 0.1
    optimizer = LowRankOptimizer(trained, rule=rule, lr=rate, momentum=0.9, dampening=0.9)
    blocks, order = TokenBlocks(data_dir, "train", BLOCK), SampleOrder(200, 42)
    schedule = ScheduleConfig(num_training_steps=20, warmup_steps=2)
    for step in range(20):
        reset_now = step % 5 == 0
        model._config.forward_type = reset_now
        for micro in range(2):
            samples = order.samples(np.arange(8 * step + 4 * micro, 8 * step + 4 * micro + 4)).tolist()
            batch = blocks.__getitems__(samples)["input_ids"]
            (model(input_ids=batch, labels=batch).loss / 2).backward()
        if reset_now:
            model.merge_and_reinit(SimpleNamespace(optimizer=optimizer), use_rand=step / 20 >= 0.5)
        optimizer.param_groups[0]["lr"] = rate * rate_multiplier(step, schedule, 20)
        optimizer.step()
        optimizer.zero_grad()
    assert int(model.refreshes) == 4
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model_20").state_dict()
    for name, tensor in model.merged_state_dict().items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    model.save_pretrained(tmp_path / "by hand")
    assert set(AutoModelForCausalLM.from_pretrained(tmp_path / "by hand").state_dict()) == set(ours)


def model_of_one(m=8, n=6, **options):
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Linear(n, m, dtype=torch.float64)

        def forward(self, x):
            return self.mlp(x)

    return ReLoRaModel(Model(), **{"r": 2, **options})


@pytest.mark.parametrize("make, key", [(torch.optim.AdamW, "exp_avg"), (torch.optim.SGD, "momentum_buffer")])
@pytest.mark.parametrize("m, n", [(8, 6), (6, 8)])
def test_torch_optimizers_have_their_momentum_carried_over(make, key, m, n):
    model, x = model_of_one(m, n), torch.randn(5, n, dtype=torch.float64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make(trained, lr=0.1, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    layer, (adapter,) = model.wrapped_model.mlp, model._adapters
    assert isinstance(layer, ReLoRaLinear)
    for step in range(4):
        model._config.forward_type = step in (0, 2)
        model(x).square().sum().backward()
        if step in (0, 2):
            before, old = layer.merged_weight(), adapter.basis.data.clone()
            moment = optimizer.state[adapter.trained][key].clone() if step else None
            model.merge_and_reinit(optimizer, use_rand=step == 2)
            torch.testing.assert_close(layer.merged_weight(), before, rtol=0, atol=1e-12)
            assert adapter.trained.count_nonzero() == 0
            if step:
                new = adapter.basis.data
                expected = moment @ old @ new.T if m >= n else new.T @ old @ moment
                torch.testing.assert_close(optimizer.state[adapter.trained][key], expected)
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.merged_weight() - layer.weight).abs().max() > 1e-3


def test_what_it_refuses():
    for options in ({"lora_only": True}, {"keep_original_weights": False}, {"quantize": "4bit"}, {"r": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            model_of_one(**options)
    model = model_of_one()
    model(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="forward_type"):
        model.merge_and_reinit(torch.optim.SGD(model.parameters()), use_rand=False)
