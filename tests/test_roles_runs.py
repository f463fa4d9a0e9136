"""Runs with rates and decays of their own for embedding, head and norms: stopped, continued, and on two devices."""

from __future__ import annotations

import helpers
import pytest
from conformance.runs import CASES, TOTAL_BATCH, Runs, assert_resumes, assert_same_weights, rounding
from launching import launch
from role_helpers import EACH_METHOD, OWN, RATE, quick, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("roles"))


# Stopping and going on.


@quick("galore", "switchlora", cases=CASES)
def test_stopped_and_resumed_changes_no_bit(runs, case, tmp_path):
    assert_resumes(runs, case, tmp_path / "run", 3, **OWN)


@pytest.mark.parametrize("method", ["full_rank", "lora"])
def test_going_on_with_another_rate_is_said(runs, tmp_path, capsys, method):
    """And done, also where the run was begun without one: the optimizer's state does not depend on its groups."""
    (case,) = [case for case in EACH_METHOD if case.method == method]
    argv = [*runs.command(case, tmp_path / "run", embed_lr=0.02), *helpers.RESUME]
    helpers.stop_after(3, argv)
    capsys.readouterr()
    resumed = train([*argv, "--embed_lr", "0.03", "--norm_weight_decay", "0.3"])
    said = capsys.readouterr().err
    assert "resuming with another --embed_lr: 0.03 instead of 0.02" in said
    assert "resuming with another --norm_weight_decay: 0.3 instead of None" in said
    assert "embedding 512: adamw, rate 0.03, weight decay 0\n" in said
    assert resumed.group_of("model.embed_tokens.weight")["initial_lr"] == 0.03
    assert resumed.group_of("model.norm.weight")["weight_decay"] == 0.3
    assert resumed.group_of("lm_head.weight")["initial_lr"] == RATE


# Several devices.

_LAYOUTS = {
    "ddp": ({"distributed_type": "ddp"}, [case for case in CASES if case.is_first or case.rule == "adam_zero"]),
    "fsdp": ({"distributed_type": "fsdp"}, [case for case in EACH_METHOD if case.spec.allows.fsdp]),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_are_one(runs, tmp_path):
    """One launch for all; every process says the whole number of weights."""
    names = [(layout, case) for layout, (_, cases) in _LAYOUTS.items() for case in cases]
    commands = [
        runs.command(case, tmp_path / f"{layout} {case}", batch_size=TOTAL_BATCH // 2, **_LAYOUTS[layout][0], **OWN)
        for layout, case in names
    ]
    said = launch(tmp_path / "launch", 2, [{"argv": argv} for argv in commands])
    assert said.count("head 512: ") == len(names)
    for layout, case in names:
        one = runs(case, **OWN)
        checkpoint = tmp_path / f"{layout} {case}" / one.checkpoint.name
        assert_same_weights(checkpoint, one.checkpoint, rounding(one.optimizer))
