"""Rates and decays of embeddings, head and norms in fine-tuning: as in pre-training, under transformers' schedule."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from finetune_helpers import glue_flags, rows, write_bert, write_rows
from transformers import AutoModelForSequenceClassification, set_seed

from peft_pretraining.finetune import glue
from peft_pretraining.finetune.options import run as options
from peft_pretraining.finetune.trainer import MethodTrainer
from peft_pretraining.optim.model_groups import roles_of

OWN = {"head_lr": 0.004, "embed_lr": 0.02, "norm_lr": 0.005, "head_weight_decay": 0.1, "norm_weight_decay": 0.3}
BASE = {"learning_rate": 0.01, "weight_decay": 0.05, "max_steps": 1, "lr_scheduler_type": "constant"}
EXPECTED = {"head": (0.004, 0.1), "embedding": (0.02, 0.05), "norms": (0.005, 0.3)}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def trainer(bert, tmp_path):
    """A function that gives a trainer over rows of random tokens, in float64."""
    train_file = write_rows(tmp_path / "train.jsonl", rows("sst2", 8))

    def build(**flags: Any) -> MethodTrainer:
        shared = {
            **{"model_name_or_path": bert, "output_dir": tmp_path / "out", "task_name": "sst2", "rank": 4},
            **{"train_file": train_file, "do_train": True, "disable_tqdm": True, "save_strategy": "no"},
        }
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).double()
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(48, (32, 8), generator=generator).tolist()
        dataset = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(tokens)]
        return MethodTrainer(glue.parse(glue_flags(**shared, **{**BASE, **flags})), model, train_dataset=dataset)

    return build


def group_of(trainer: MethodTrainer, param: torch.Tensor) -> dict[str, Any]:
    (group,) = [g for g in trainer.bare_optimizer.param_groups if any(each is param for each in g["params"])]
    return group


@pytest.mark.parametrize("method", ["full_rank", "galore", "switchlora"])
def test_each_role_moves_at_its_own_rate(trainer, method):
    """One update is the plain one's at the rate and decay of the role; the classifier is the head."""
    plain, ours = trainer(method=method, weight_decay=0), trainer(method=method, **OWN)
    start = {name: param.detach().clone() for name, param in ours.model.named_parameters()}
    for run in (plain, ours):
        set_seed(0)  # dropout
        run.train()
    moved = dict(plain.model.named_parameters())
    roles = roles_of(ours.model, ())
    assert roles["classifier.weight"] == "head" and roles["classifier.bias"] == "norms"
    for name, param in ours.model.named_parameters():
        if not param.requires_grad:
            continue
        rate, decay = EXPECTED.get(roles[name], (0.01, 0.05))
        group = group_of(ours, param)
        assert (group["initial_lr"], group["weight_decay"]) == (rate, decay), name
        kept, step = 1 - rate * decay, (moved[name] - start[name]) * (rate / 0.01)
        wanted = (start[name] + step) * kept if method == "galore" else start[name] * kept + step
        torch.testing.assert_close(param, wanted, rtol=0, atol=1e-13, msg=lambda text, n=name: n + text)


def test_the_schedule_multiplies_each_rate(trainer):
    run = trainer(method="lora", **OWN, max_steps=4, lr_scheduler_type="linear")
    run.train()
    seen = {group["initial_lr"] for group in run.bare_optimizer.param_groups}
    assert seen == {0.01, 0.004, 0.02, 0.005}
    assert [group["lr"] for group in run.bare_optimizer.param_groups] == [0.0] * len(run.bare_optimizer.param_groups)
    run = trainer(method="lora", **OWN, max_steps=2, lr_scheduler_type="linear", warmup_steps=4)
    run.train()
    for group in run.bare_optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] / 2)


def test_a_decay_of_norms_wins_over_sparing_them(trainer):
    for method in ("full_rank", "golore_adapter"):
        for own, expected in (({}, 0.0), ({"norm_weight_decay": 0.3}, 0.3), ({"norm_weight_decay": 0}, 0.0)):
            run = trainer(method=method, **own)
            run.create_optimizer()
            roles = roles_of(run.model, ())
            for name, param in run.model.named_parameters():
                if param.requires_grad:
                    assert group_of(run, param)["weight_decay"] == (expected if roles[name] == "norms" else 0.05), name


def test_the_log_says_what_each_group_got(trainer, caplog):
    with caplog.at_level(logging.INFO, "peft_pretraining"):
        trainer(method="lora", **OWN).train()
    said = [record.getMessage() for record in caplog.records if "weight decay" in record.getMessage()]
    settings = [line.partition(": ")[2] for line in said]
    rates = ["rate 0.01, weight decay 0.05", "rate 0.02, weight decay 0.05"]
    rates += ["rate 0.004, weight decay 0.1", "rate 0.005, weight decay 0.3"]
    assert settings == [f"adamw, {rate}" for rate in rates]
    assert [line.split()[0] for line in said] == ["matrices", "embedding", "head", "norms"]
    assert "factors 512" in said[0] and said[2].startswith("head 64: ")


def test_option_tasks_have_them_too(tmp_path, capsys):
    flags = ["--task_name", "SST2", "--model_name", "m", "--output_dir", str(tmp_path / "out"), "--head_lr", "0.004"]
    flags += ["--method", "lora", "--norm_weight_decay", "0.3", "--train_file", __file__]
    config = options.parse([*flags]).config
    assert (config.roles.head_lr, config.roles.norm_weight_decay, config.roles.adam_lr) == (0.004, 0.3, None)
