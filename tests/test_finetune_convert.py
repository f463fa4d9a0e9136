"""The model that `convert` returns, which may be another object than it was given, is what is trained and saved."""

import copy
import shutil

import pytest
import torch
from finetune_helpers import glue_flags, rows, run_glue, write_bert, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from peft_pretraining.finetune import glue
from peft_pretraining.finetune.trainer import MethodTrainer
from peft_pretraining.methods import load_method


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def returned(monkeypatch):
    """Lets methods convert a copy of the model, whose first one is made useless; the models that were returned."""
    models = []

    def elsewhere(convert):
        def convert_a_copy(method, model):
            models.append(convert(method, copy.deepcopy(model)))
            for param in model.parameters():
                param.data = torch.full_like(param, torch.nan)
            return models[-1]

        return convert_a_copy

    for method in map(load_method, ("full_rank", "lora")):
        monkeypatch.setattr(method, "convert", elsewhere(method.convert))
    return models


def test_the_trainer_has_no_other_model(bert, tmp_path, returned):
    finetuning = glue.parse(
        glue_flags(task_name="sst2", model_name_or_path=bert, output_dir=tmp_path, method="full_rank", use_cpu=True)
    )
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    trainer = MethodTrainer(finetuning, model, train_dataset=[{"input_ids": [4, 5], "labels": 0}] * 8)
    assert trainer.model is trainer.model_wrapped is trainer.callback_handler.model is returned[0] is not model


@pytest.mark.parametrize("method", [pytest.param("full_rank", marks=pytest.mark.slow), "lora"])
def test_runs_are_those_of_a_model_that_is_converted_in_place(method, bert, tmp_path, request):
    """Trained, saved, loaded from a checkpoint, evaluated with the best weights: no bit differs."""
    data = {
        name: write_rows(tmp_path / f"{name}.jsonl", rows("sst2", 24)) for name in ("train_file", "validation_file")
    }
    flags = {**data, "task_name": "sst2", "model_name_or_path": bert, "method": method, "rank": 4, "max_steps": 4}
    flags |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    flags |= {"load_best_model_at_end": True, "learning_rate": 5e-3}
    expected = run_glue(**flags, output_dir=tmp_path / "in_place")
    returned = request.getfixturevalue("returned")
    found = run_glue(**flags, output_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_glue(**flags, output_dir=tmp_path / "resumed")
    assert len(returned) == 2
    for name in ("eval_accuracy", "eval_loss", "train_loss", "trainable_parameters"):
        assert found[name] == expected[name], name
    wanted = load_file(tmp_path / "in_place" / "model.safetensors")
    for name in ("whole", "resumed"):
        weights = load_file(tmp_path / name / "model.safetensors")
        assert weights.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(weights[key], wanted[key])] == []
    first, last = (load_file(tmp_path / "whole" / f"checkpoint-{n}" / "model.safetensors") for n in (2, 4))
    assert any(not torch.equal(first[key], last[key]) for key in wanted)
