"""Names that other trainers give to the settings."""

from __future__ import annotations

import pytest

from peft_pretraining.config import cli, foreign_names, legacy
from peft_pretraining.flags import ConfigError


@pytest.mark.parametrize(("name", "ours"), foreign_names.SAME.items())
def test_a_name_that_means_the_same_sets_the_same(command, name, ours):
    values = {
        **{"lr": 0.5, "scheduler": "linear", "batch_size": 2, "gradient_accumulation": 2, "total_batch_size": 8},
        **{"num_training_steps": 40, "warmup_steps": 3, "clip_grad_norm": 0.25, "adam_eps": 1e-6, "max_length": 32},
        **{"workers": 1, "activation_checkpointing": True, "save_every": 5, "eval_every": 7, "keep_checkpoints": 2},
        **{"name": "one", "target_modules": ("attn",), "tokenizer": "t5-base", "dtype": "float32"},
    }
    if ours in ("save_dir", "resume_from"):
        assert cli_flags()[ours].accepted.count(name) == 1
        return
    raw = ",".join(values[ours]) if isinstance(values[ours], tuple) else str(values[ours])
    method = "galore" if ours == "target_modules" else "full_rank"
    launch = cli.load([*command(**{ours: None}), "--method", method, f"--{name}", raw])
    assert launch.config.settings()[ours] == values[ours]
    assert not any(f"--{ours}" in warning for warning in launch.warnings)


def cli_flags():
    return {flag.name: flag for flag in cli.all_flags()}


def test_no_name_has_two_meanings():
    names = [name for flag in cli.all_flags() for name in flag.accepted]
    assert len(names) == len(set(names))
    assert not set(names) & set(foreign_names.HINTS)
    assert set(foreign_names.SAME.values()) <= set(cli_flags())


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--epochs 3", "unknown flag --epochs: the length of a run is --num_training_steps (updates) or --max_train"),
        ("--num_train_epochs=3", "unknown flag --num_train_epochs: the length of a run is --num_training_steps"),
        ("--bf16", "unknown flag --bf16: weights and arithmetic are --precision (mixed, bf16, bf16_sr or fp32)"),
        ("--model gpt2", "unknown flag --model: a new model's shape is --model_config (a JSON file)"),
        ("--logging_dir x", "unknown flag --logging_dir: metrics.jsonl and the checkpoints are in --save_dir"),
        (
            "--dry_run",
            "unknown flag --dry_run: scripts/pretrain.sh has it; python -m peft_pretraining.report.plan FLAGS",
        ),
        ("--lora_schedule x", "unknown flag --lora_schedule"),
        ("--lr_schedule x", "unknown flag --lr_schedule (did you mean scheduler?)"),
    ],
)
def test_what_has_another_meaning_is_answered(command, flag, answer):
    with pytest.raises(ConfigError) as caught:
        cli.load([*command(), *flag.split()])
    (problem,) = caught.value.problems
    assert problem.startswith(answer)


def test_hints_are_given_for_yaml_keys(command, tmp_path):
    (tmp_path / "file.yaml").write_text("epochs: 3\nlearning_rate: 0.5\n")
    with pytest.raises(ConfigError) as caught:
        cli.load(command(lr=None, training_config=tmp_path / "file.yaml"))
    (problem,) = caught.value.problems
    assert "unknown key 'epochs': the length of a run is --num_training_steps (updates)" in problem


@pytest.mark.parametrize("name", sorted(legacy.REFUSED))
@pytest.mark.parametrize("typo", [lambda name: name + "s", lambda name: name[:-1], lambda name: name.upper()])
def test_no_refused_flag_is_proposed(command, name, typo):
    with pytest.raises(ConfigError) as caught:
        cli.load([*command(), f"--{typo(name)}", "1"])
    (problem,) = caught.value.problems
    assert f"mean {name}" not in problem
