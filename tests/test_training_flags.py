"""The flags of transformers' `TrainingArguments`: all are known, each is obeyed or refused, and none takes long."""

import dataclasses
import subprocess
import sys

import pytest
from helpers import PROJECT, child_environment
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from peft_pretraining.finetune import glue, settings
from peft_pretraining.finetune.glue_settings import ENTRY
from peft_pretraining.finetune.options.settings import ENTRY as OPTIONS
from peft_pretraining.finetune.training_flags import training_defaults, training_fields
from peft_pretraining.finetune.training_table import CHOICES, MAY_CHANGE, OBEYED, REFUSED, WITHOUT_EFFECT
from peft_pretraining.flags import ConfigError

GLUE = "--model_name_or_path roberta-base --task_name rte --output_dir OUT".split()
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}

VALUES = {
    **{"lr_scheduler_kwargs": '{"num_cycles": 2}', "log_level": "info", "log_level_replica": "error"},
    **{"torch_compile_backend": "eager", "torch_compile_mode": "default", "report_to": "tensorboard"},
    **{"activation_checkpointing_kwargs": "{}", "gradient_checkpointing_kwargs": "{}", "label_smoothing_factor": "0.2"},
    **{"metric_for_best_model": "loss", "accelerator_config": '{"split_batches": true}', "adam_beta1": "0.8"},
    **{"adam_beta2": "0.9", "dataloader_multiprocessing_context": "spawn", "ddp_backend": "gloo"},
}


def other_value(name: str) -> str:
    """A value that is not the default, as on a command line."""
    default, kind = training_defaults()[name], training_fields()[name].type
    if name in VALUES:
        return VALUES[name]
    if name in CHOICES:
        return next(value for value in CHOICES[name] if value != default)
    if kind.startswith("bool"):
        return str(not default)
    return "7" if "int" in kind or "float" in kind else "something"


def test_every_field_is_known_as_it_is():
    found = training_fields()
    assert list(found) == list(FIELDS)
    for name, field in FIELDS.items():
        if field.default is not dataclasses.MISSING and name != "optim":  # which depends on the version of torch
            assert found[name].default == field.default, name
        assert found[name].help == " ".join(field.metadata.get("help", "").split()), name


def test_every_field_is_obeyed_or_refused():
    """A field that a newer transformers brings is refused until it has a place in the tables."""
    known = [*OBEYED, *REFUSED, *(name for name in WITHOUT_EFFECT if name in FIELDS)]
    assert sorted(known) == sorted(FIELDS)
    own = {item.name for entry in (ENTRY, OPTIONS) for item in dataclasses.fields(entry.task_type)}
    assert {name for name in MAY_CHANGE - {*FIELDS} if name not in own} == {"overwrite_output_dir", "seeds"}


def test_choices_are_those_of_transformers():
    for name, kind in (
        ("lr_scheduler_type", SchedulerType),
        ("eval_strategy", IntervalStrategy),
        ("logging_strategy", IntervalStrategy),
        ("save_strategy", SaveStrategy),
    ):
        assert set(CHOICES[name]) == {item.value for item in kind}, name
    for name, field in FIELDS.items():
        if "choices" in field.metadata:
            assert set(field.metadata["choices"]) <= set(CHOICES[name]), name


@pytest.mark.parametrize("name", REFUSED)
def test_refused_flags_say_why(name):
    for entry in (ENTRY, OPTIONS):
        with pytest.raises(ConfigError) as error:
            settings.check([*GLUE, f"--{name}", other_value(name)], entry)
        assert any(line.startswith(f"--{name} ") and REFUSED[name] in line for line in error.value.problems)
    default = training_defaults()[name]
    given = "adamw_torch" if name == "optim" else str(default)
    if not isinstance(default, dict | list):
        settings.check([*GLUE, f"--{name}", given], ENTRY)  # it is what it is anyway


@pytest.mark.parametrize("name", [name for name in OBEYED if name != "output_dir"])
def test_obeyed_flags_arrive(name):
    if name == "bf16" or name.startswith(("fp16", "bf16", "tf32")):
        pytest.skip("needs an accelerator")
    if name == "ddp_backend":
        assert glue.parse([*GLUE, "--ddp_backend", "gloo"]).warnings == (
            "--ddp_backend has no effect without torchrun",
        )
        return
    value = other_value(name)
    extra = {
        "load_best_model_at_end": "--eval_strategy steps --save_strategy steps",
        "dataloader_persistent_workers": "--dataloader_num_workers 1",
        "dataloader_prefetch_factor": "--dataloader_num_workers 1",
    }.get(name, "")
    found = glue.parse([*GLUE, *extra.split(), f"--{name}", value])
    arrived = getattr(found.training, name)
    arrived = getattr(arrived, "value", arrived)
    shown = {"project": "something", "accelerator_config": None}.get(name, value)
    if isinstance(arrived, list):
        assert arrived == [value]
    elif isinstance(arrived, dict):
        assert str(arrived) in (value.replace('"', "'"), "{}")
    elif shown is not None:
        assert str(arrived) in (shown, f"{float(shown)}" if shown.replace(".", "").isdigit() else shown), name
    assert found.values[name] != training_defaults()[name]


@pytest.mark.parametrize("script", ["run_glue", "run_tasks"])
def test_a_bad_flag_is_refused_before_anything_heavy_is_imported(script):
    code = f"""import sys, {script}
assert {script}.main(["--lr", "x", "--nonsense", "1"]) == 2
print([name for name in ("torch", "transformers", "datasets", "accelerate", "sklearn") if name in sys.modules])"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=child_environment(), capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
    assert "error: --lr must be a number, got 'x'" in done.stderr and "unknown flag --nonsense" in done.stderr


@pytest.mark.parametrize(
    "text, told",
    [
        ("--seed -1", "--seed must be between 0 and 4294967295"),
        ("--seeds 1,-2", "--seeds must be between 0 and 4294967295"),
        ("--label_smoothing_factor 1.5", "--label_smoothing_factor must be between 0 and 1"),
        ("--adam_beta2 1", "--adam_beta2 must be at least 0 and below 1"),
        ("--max_grad_norm -1", "--max_grad_norm must be at least 0"),
        ("--learning_rate nan", "--learning_rate must be finite"),
        ("--output_dir run_glue.py", "--output_dir run_glue.py is not a folder"),
    ],
)
def test_values_that_cannot_be(text, told, monkeypatch):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(ConfigError) as error:
        settings.check([*GLUE, *text.split()], ENTRY)
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(told)


@pytest.mark.parametrize("world", ["", "x", "0", "2"])
def test_an_environment_that_is_no_launchers(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE (must be a whole number|is 2, but RANK)"):
        settings.check(GLUE, ENTRY)


def test_best_by_a_number_that_no_evaluation_finds(tmp_path):
    from peft_pretraining.finetune.options import run

    text = "--metric_for_best_model f1 --load_best_model_at_end --eval_strategy steps --task_name SST2 --model_name a"
    with pytest.raises(ConfigError, match="--metric_for_best_model f1: an evaluation finds loss, accuracy"):
        run.parse([*text.split(), "--output_dir", str(tmp_path)])
