"""One process: a method learns, and what must not change its result does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import helpers
import pytest
import torch

from conformance.runs import (
    CASES,
    TOTAL_BATCH,
    UPDATES,
    allowing,
    assert_resumes,
    assert_same_weights,
    differing,
    each_case,
    inside_backward,
    observed,
    rounding,
    snapshot,
)
from peft_pretraining.config import cli

STOP = 3
POISONED = {0: helpers.poisoned_loss, 3: helpers.poisoned_gradient}
"""0-based update -> how it becomes non-finite: in the first one, all first bases are due."""


@each_case()
def test_learns(runs, case):
    before, after = runs(case).losses
    assert after < before - 0.05
    losses = [row[1] for row in helpers.updates(runs(case).folder)]
    assert len(losses) == UPDATES and all(map(lambda loss: loss == loss, losses))


@each_case()
def test_accumulated_micro_batches_are_one_batch(runs, case):
    whole, parts = runs(case), runs(case, batch_size=TOTAL_BATCH // 4, gradient_accumulation=4)
    assert_same_weights(parts.checkpoint, whole.checkpoint, rounding(whole.optimizer))


@each_case()
def test_the_same_command_gives_the_same_bits(runs, case):
    helpers.assert_same_run(runs(case, again=1).folder, runs(case).folder)


@each_case()
def test_stopped_and_resumed_changes_no_bit(runs, case, tmp_path):
    assert_resumes(runs, case, tmp_path / "run", STOP)


@each_case()
def test_embedding_head_and_norms_have_settings_of_their_own(runs, case):
    """What they are has a group with the rate and the decay that were given; tests/test_roles.py has what that does."""
    rates, decays = {"head": 0.003, "embed": 0.02, "norm": 0.005}, {"head": 0.1, "embed": 0.2, "norm": 0.3}
    own = {f"{role}_lr": rate for role, rate in rates.items()}
    own |= {f"{role}_weight_decay": decay for role, decay in decays.items()}
    run = runs(case, num_training_steps=1, warmup_steps=0, **own)
    groups = {param: group for group in run.optimizer.param_groups for param in group["params"]}
    for name, param in run.model.named_parameters():
        role = {"embed_tokens": "embed", "lm_head": "head"}.get(name.split(".")[-2], "norm" if "norm" in name else "")
        if role:
            given = (groups[param]["initial_lr"], groups[param]["weight_decay"])
            assert given == (rates[role], decays[role]), name


@pytest.mark.slow
@each_case()
@pytest.mark.parametrize("stop", [update for update in range(1, UPDATES) if update != STOP])
def test_stopped_anywhere_and_resumed_changes_no_bit(runs, case, tmp_path, stop):
    assert_resumes(runs, case, tmp_path / "run", stop)


@contextlib.contextmanager
def watched_updates(monkeypatch) -> Iterator[list[tuple[int, list[str]]]]:
    """(0-based update, names of the tensors that changed between its first forward pass and its end) of a run."""
    from peft_pretraining.training import loop as train

    train_step, forward_backward, before, changed = train.train_step, train.forward_backward, {}, []

    def step(run, micro_batches, stop):
        number = run.state.update_step
        update = train_step(run, micro_batches, stop)
        changed.append((number, differing(before.pop(number), snapshot(run))))
        return update

    def forward(run, micro_batches):
        before.setdefault(run.state.update_step, snapshot(run))
        return forward_backward(run, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        patch.setattr(train, "forward_backward", forward)
        yield changed


@each_case()
def test_a_non_finite_gradient_leaves_no_trace(runs, case, tmp_path, monkeypatch):
    """Weights and states are those of before, bit by bit; what was due in that update is done in the next one."""
    with contextlib.ExitStack() as stack:
        changed = stack.enter_context(watched_updates(monkeypatch))
        for step, poisoned in POISONED.items():
            stack.enter_context(helpers.poison(monkeypatch, {step}, poisoned, micro_batch=0))
        # Of so many updates, two may be lost; the rest of them is of no interest.
        helpers.stop_after(6, runs.command(case, tmp_path / "run", num_training_steps=20 * len(POISONED)))
    assert [step for step, _ in changed] == list(range(6))
    for step, names in changed:
        assert (names == []) == (step in POISONED), f"update {step}: {names}"
    rows = {row["update_step"]: row for row in helpers.records(tmp_path / "run") if "loss" in row}
    undisturbed = next(row for row in helpers.records(runs(case).folder) if "loss" in row)
    assert undisturbed.keys() <= rows[2].keys()


@each_case(case for case in CASES if case.is_first)
def test_a_rate_of_the_heads_own(runs, case):
    """`--head_lr` changes how far the head moves in the first update, or is said to have no effect."""
    one_update = {"num_training_steps": 1, "warmup_steps": 0, "eval_every": 1, "save_every": 1}
    argv = runs.command(case, runs.folder / "unused", **one_update, head_lr=0.003)
    warnings = " ".join(cli.load(argv, environ={}).warnings)
    ordinary, own = (runs(case, **one_update, **changes) for changes in ({}, {"head_lr": 0.003}))
    heads = [outcome.model.get_output_embeddings().weight for outcome in (ordinary, own)]
    assert torch.equal(*heads) == ("--head_lr" in warnings), warnings


@each_case(allowing("per_layer"))
def test_per_layer_updates_are_ordinary_ones(runs, case):
    shared = inside_backward(case)
    ordinary = runs(case, **shared)
    for batch_size in (TOTAL_BATCH, TOTAL_BATCH // 2):
        sizes = {"batch_size": batch_size, "gradient_accumulation": TOTAL_BATCH // batch_size}
        inside = runs(case, **shared, per_layer=True, **sizes)
        assert_same_weights(inside.checkpoint, ordinary.checkpoint, rounding(ordinary.optimizer))


@each_case(allowing("quantized_weights"))
def test_quantised_weights_learn_and_resume(runs, case, tmp_path):
    """Frozen, they take a byte each."""
    outcome = runs(case, quantize="8bit", dtype="float32")
    assert outcome.losses[1] < outcome.losses[0] - 0.05
    dtypes = [value.dtype for name, value in outcome.model.state_dict().items() if ".0.mlp.up_proj." in name]
    assert {torch.int8, torch.uint8} & {*dtypes}, dtypes
    assert_resumes(runs, case, tmp_path / "run", STOP, quantize="8bit", dtype="float32")


def test_the_suite_sees_runs(runs):
    """What it compares is there: a run's weights move, and the snapshots see it."""
    with observed() as seen:
        assert helpers.run(runs.command(CASES[0], runs.folder / "seen")) == 0
    after = snapshot(seen[0])
    assert any(name.startswith("state.") for name in after)
    assert differing(after, {name: torch.zeros_like(value) for name, value in after.items()})
