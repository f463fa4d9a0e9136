"""What a method does not declare is refused in one line, or said to have no effect."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from finetune_helpers import glue_flags, rows, write_bert, write_rows

from conformance.runs import CASES, Case, each_case
from peft_pretraining.config import cli
from peft_pretraining.finetune import glue
from peft_pretraining.flags import ConfigError
from peft_pretraining.optim.rule_settings import RULES

FIRST = [case for case in CASES if case.is_first]


def lacking(permission: str) -> list[Case]:
    return [case for case in FIRST if not getattr(case.spec.allows, permission)]


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


@each_case(FIRST)
def test_other_update_rules_are_refused(runs, case, tmp_path):
    for rule in set(RULES) - set(case.spec.update_rules):
        refused, lines = answer(runs, case, tmp_path, optimizer=rule)
        assert refused and len(lines) == 1 and "\n" not in lines[0], lines
        assert f"--optimizer {rule}" in lines[0] and case.method in lines[0]


@each_case(lacking("fsdp"))
def test_dividing_the_model_is_refused(runs, case, tmp_path):
    refused, lines = answer(runs, case, tmp_path, distributed_type="fsdp")
    assert refused and len(lines) == 1 and case.method in lines[0]


@each_case(lacking("per_layer"))
def test_per_layer_updates_are_told(runs, case, tmp_path):
    assert_told(runs, case, tmp_path, "per_layer", "True")


@each_case(lacking("quantized_weights"))
def test_quantised_weights_are_told(runs, case, tmp_path):
    assert_told(runs, case, tmp_path, "quantize", "8bit")


@each_case(lacking("projected_gradient"))
def test_reducing_projected_gradients_is_told(runs, case, tmp_path):
    assert_told(runs, case, tmp_path, "reduce_low_rank", "True")


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
    flags = {**task, **case.settings, "output_dir": tmp_path / "out", **changes}
    flags.pop("lr", None)
    with pytest.raises(ConfigError) as error:
        glue.parse(glue_flags(**flags))
    return error.value.problems


@each_case(lacking("fine_tuning"))
def test_fine_tuning_is_refused(case, task, tmp_path):
    (line,) = fine_tuning_problems(case, task, tmp_path)
    assert case.method in line and "fine-tune" in line


@each_case(case for case in lacking("fp16") if case.spec.allows.fine_tuning)
def test_fine_tuning_in_float16_is_refused(case, task, tmp_path):
    assert any(
        "--fp16" in line and case.method in line for line in fine_tuning_problems(case, task, tmp_path, fp16=True)
    )
