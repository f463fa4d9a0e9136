"""What a method does not declare is refused in one line, or said to have no effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from finetune_helpers import glue_flags, rows, write_bert, write_rows

from conformance.runs import CASES, Case, each_case
from peft_pretraining.config import cli
from peft_pretraining.finetune import glue, settings
from peft_pretraining.flags import Allows, ConfigError
from peft_pretraining.optim.rule_settings import RULES

FIRST = [case for case in CASES if case.is_first]


def answer(runs, case: Case, tmp_path, **changes) -> tuple[bool, Sequence[str]]:
    """Whether a command is refused, and why, or its warnings."""
    try:
        return False, cli.load(runs.command(case, tmp_path / "run", **changes), environ={}).warnings
    except ConfigError as error:
        return True, error.problems


def assert_told(runs, case: Case, tmp_path, name: str, value: str) -> None:
    """One line, more than without the setting, names it: as refused, or as without effect."""
    before = answer(runs, case, tmp_path)[1]
    refused, lines = answer(runs, case, tmp_path, **{name: value})
    (line,) = [line for line in lines if line not in before]
    assert "\n" not in line and f"--{name}" in line
    assert refused or "effect" in line


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    return {
        "task_name": "sst2",
        "train_file": write_rows(folder / "train.jsonl", rows("sst2", 4)),
        "model_name_or_path": write_bert(folder / "bert"),
        "do_train": True,
    }


def fine_tuning_problems(case: Case, task, tmp_path, **changes) -> Sequence[str]:
    """Those of a command line of run_glue.py."""
    flags = {**task, **case.settings, "output_dir": tmp_path / "out", **changes}
    flags.pop("lr", None)
    with pytest.raises(ConfigError) as error:
        glue.parse(glue_flags(**flags))
    return error.value.problems


@each_case(FIRST)
def test_other_update_rules_are_refused(runs, case, tmp_path):
    for rule in set(RULES) - set(case.spec.update_rules):
        refused, lines = answer(runs, case, tmp_path, optimizer=rule)
        assert refused and len(lines) == 1 and "\n" not in lines[0], lines
        assert f"--optimizer {rule}" in lines[0] and case.method in lines[0]


def told(setting: str, value: str):
    """A check of a setting that asks for the permission."""
    return lambda runs, case, tmp_path, task: assert_told(runs, case, tmp_path, setting, value)


def division_is_refused(runs, case, tmp_path, task) -> None:
    refused, lines = answer(runs, case, tmp_path, distributed_type="fsdp")
    assert refused and len(lines) == 1 and case.method in lines[0]


def fine_tuning_is_refused(runs, case, tmp_path, task) -> None:
    (line,) = fine_tuning_problems(case, task, tmp_path)
    assert case.method in line and "fine-tune" in line


def scaled_losses_are_refused(runs, case, tmp_path, task) -> None:
    """As on a machine with an accelerator; nowhere else are losses scaled."""
    if not case.spec.allows.fine_tuning:
        return fine_tuning_is_refused(runs, case, tmp_path, task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "_training_arguments", lambda *_: SimpleNamespace(fp16=True))
        (line,) = fine_tuning_problems(case, task, tmp_path, fp16=True)
    assert "--fp16" in line and case.method in line


def stochastic_rounding_is_refused(runs, case, tmp_path, task) -> None:
    refused, lines = answer(runs, case, tmp_path, dtype="auto", precision="bf16_sr")
    assert refused and len(lines) == 1 and "--precision bf16_sr" in lines[0] and case.method in lines[0]


CHECKS = {
    "stochastic_rounding": stochastic_rounding_is_refused,
    "stored_bases": told("basis_dtype", "int8"),
    "projected_gradient": told("reduce_low_rank", "True"),
    "per_layer": told("per_layer", "True"),
    "tables": told("head_optimizer", "method"),
    "quantized_weights": told("quantize", "8bit"),
    "fsdp": division_is_refused,
    "fine_tuning": fine_tuning_is_refused,
    "fp16": scaled_losses_are_refused,
}
LACKING = [(case, name) for case in FIRST for name in CHECKS if not getattr(case.spec.allows, name)]


@pytest.mark.parametrize(("case", "permission"), LACKING, ids=[f"{case}-{name}" for case, name in LACKING])
def test_what_is_not_declared_is_told(runs, case, permission, tmp_path, task):
    CHECKS[permission](runs, case, tmp_path, task)


def test_every_permission_is_checked():
    assert set(CHECKS) == {item.name for item in dataclasses.fields(Allows)}
