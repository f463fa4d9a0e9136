"""Names that other trainers give to the settings."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

import pretokenize
from peft_pretraining.config import cli, foreign_names, legacy
from peft_pretraining.data.pretokenize_config import FOREIGN
from peft_pretraining.flags import ConfigError, parse_command_line


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


def test_every_argument_of_transformers_trainer_is_accepted_or_answered():
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    tree = ast.parse((folder / "training_args.py").read_text())  # to import it takes seconds
    (arguments,) = (node for node in tree.body if getattr(node, "name", None) == "TrainingArguments")
    fields = (node for node in arguments.body if isinstance(node, ast.AnnAssign))
    names = {node.target.id for node in fields if not node.target.id.startswith("_")}
    assert len(names) > 80
    accepted = {name for flag in cli.all_flags() for name in flag.accepted}
    assert names - accepted - set(foreign_names.HINTS) == set()


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--epochs 3", "unknown flag --epochs: the length of a run is --num_training_steps (updates) or --max_train"),
        ("--num_train_epochs=3", "unknown flag --num_train_epochs: the length of a run is --num_training_steps"),
        ("--warmup_ratio 0.1", "unknown flag --warmup_ratio: the warm-up is --warmup_steps (updates)"),
        ("--push_to_hub", "unknown flag --push_to_hub: exports are folders (python -m peft_pretraining.export)"),
        ("--evaluation_strategy steps", "unknown flag --evaluation_strategy: evaluations come with --eval_every"),
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


@pytest.mark.parametrize(
    ("name", "ours", "value"),
    [(name, ours, "7") for ours, names in FOREIGN.items() for name in names],
)
def test_pretokenize_knows_other_programs_names(name, ours, value):
    problems = []
    given = parse_command_line(
        pretokenize.FLAGS,
        [f"--{name}", *([value] if ours != "overwrite" else [])],
        prog="",
        description="",
        problems=problems,
    )
    assert problems == [] and set(given) == {ours}


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
