"""Fine-tuning through transformers' Trainer, where a method declares it, learns a toy task."""

from __future__ import annotations

import json

import pytest
from finetune_helpers import rows, run_glue, write_bert, write_rows

from conformance.runs import allowing, each_case
from peft_pretraining.optim.rule_settings import RULES

STEPS = 30


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Sentences whose class is told by their first word, and a small encoder."""
    folder = tmp_path_factory.mktemp("task")
    return {
        "task_name": "sst2",
        "train_file": write_rows(folder / "train.jsonl", rows("sst2", 40, seed=1)),
        "validation_file": write_rows(folder / "validation.jsonl", rows("sst2", 16, seed=2)),
        "model_name_or_path": write_bert(folder / "bert"),
    }


@each_case(case for case in allowing("fine_tuning") if RULES[case.rule].fine_tuning)
def test_learns_a_toy_task(case, task, tmp_path):
    settings = {"learning_rate": 5e-3, **case.settings}
    settings["learning_rate"] = settings.pop("lr", settings["learning_rate"])
    flags = {**task, **settings, "lora_all_modules": True, "max_steps": STEPS, "output_dir": tmp_path / "out"}
    results = run_glue(**flags)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS and sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    assert results["method"] == case.method
