"""The train loop against a loop written out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BLOCK

import torchrun_main
from peft_pretraining.config import ModelConfig, ScheduleConfig
from peft_pretraining.config.schedule import rate_multiplier
from peft_pretraining.data.blocks import SampleOrder, TokenBlocks
from peft_pretraining.models.llama import build_model


def metrics(save_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_full_rank_is_a_bare_loop(command, data_dir, model_json, tmp_path, accumulation):
    """transformers' own loss, torch's AdamW and torch's clipping, over the same samples."""
    flags = command(batch_size=8 // accumulation, weight_decay=0.1, clip_grad_norm=0.5, num_training_steps=12)
    assert torchrun_main.main(flags) == 0
    updates = [record for record in metrics(tmp_path / "run") if "loss" in record]

    model = build_model(ModelConfig(), json.loads(model_json.read_text()), None, torch.device("cpu"), seed=42)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    blocks, order = TokenBlocks(data_dir, "train", BLOCK), SampleOrder(200, 42)
    schedule = ScheduleConfig(num_training_steps=12, warmup_steps=2)
    clipped = 0
    for step, update in enumerate(updates):
        batch = blocks.__getitems__(order.samples(np.arange(8 * step, 8 * step + 8)).tolist())["input_ids"]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = rate = 1e-2 * rate_multiplier(step, schedule, 12)
        optimizer.step()
        optimizer.zero_grad()
        clipped += norm > 0.5
        assert update["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert update["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert update["lr"] == rate
    assert len(updates) == 12 and 0 < clipped


def test_extra_steps_run_at_the_last_rate_and_tokens_give_the_length(command, tmp_path):
    """--max_train_tokens is in tokens; --num_extra_training_steps follow the schedule's end."""
    flags = command(num_training_steps=None, max_train_tokens=6 * 8 * BLOCK + 1, num_extra_training_steps=3)
    assert torchrun_main.main(flags) == 0
    records = metrics(tmp_path / "run")
    rates = [record["lr"] for record in records if "loss" in record]
    assert len(rates) == 9
    assert rates[5] == rates[6] == rates[7] == rates[8] < rates[4]
    assert records[-1]["tokens_seen"] == 9 * 8 * BLOCK
    assert (tmp_path / "run" / "model_9").is_dir()


def test_profile_writes_a_trace(command, tmp_path):
    assert torchrun_main.main([*command(num_training_steps=6), "--profile", "2"]) == 0
    trace = json.loads((tmp_path / "run" / "profile" / "trace_rank0.json").read_text())
    assert any("aten::mm" in event.get("name", "") for event in trace["traceEvents"])


def test_bfloat16_float64_and_checkpointed_activations_train(command, tmp_path):
    """The dtype reaches weights, optimizer state and the exported model; recomputing activations changes no loss."""
    losses = {}
    for name, extra in {
        "bfloat16": {"dtype": "bf16", "method": "galore", "rank": 4},
        "float64": {"dtype": "float64", "method": "galore", "rank": 4},
        "recomputed": {"dtype": "float64", "method": "galore", "rank": 4, "activation_checkpointing": "True"},
    }.items():
        save_dir = tmp_path / name
        assert torchrun_main.main(command(save_dir=save_dir, num_training_steps=4, **extra)) == 0
        losses[name] = [record["loss"] for record in metrics(save_dir) if "loss" in record]
        assert json.loads((save_dir / "model_4" / "config.json").read_text())["dtype"] == name.replace(
            "recomputed", "float64"
        )
    assert losses["recomputed"] == pytest.approx(losses["float64"], abs=1e-12)
    assert losses["bfloat16"] == pytest.approx(losses["float64"], abs=0.05)
