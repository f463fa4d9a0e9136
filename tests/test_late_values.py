"""Numbers of updates that are read one update late: the same run as when they are read at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import helpers
import pytest
import torch
from helpers import GALORE, RESUME, before_update, poison, poisoned_gradient
from test_distributed import TORCHRUN
from test_spikes import bad_batches, soon  # noqa: F401 (a fixture)

from peft_pretraining.training import late_values

QUICK = {"eval_tokens": 64, "eval_every": 7, "save_every": 5, "num_training_steps": 15}
FULL_RANK = {"method": "full_rank"}
METHODS = {
    "full_rank": FULL_RANK,
    "galore": {**GALORE, "update_proj_gap": 4},
    "lora": {"method": "lora", "rank": 4},
    "switchlora": {"method": "switchlora", "rank": 4, "init_lora_type": "switchlora", "lora_alpha": 1.0},
    "per_layer": {**GALORE, "update_proj_gap": 4, "per_layer": True},
}
TIMES = ("throughput_tokens", "step_time", "peak_memory_bytes")


def late(monkeypatch, on=True):
    monkeypatch.setattr(late_values, "ON_EVERY_DEVICE", on)


def recorded(folder):
    """What the run wrote, in its order, but for times."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in helpers.records(folder)]


def both(command, tmp_path, monkeypatch, act, **settings):
    """Folders of a run whose numbers are read at once and of one whose numbers are read late."""
    for on in (False, True):
        late(monkeypatch, on)
        act(command(**{**QUICK, **settings, "save_dir": tmp_path / str(on)}))
    return tmp_path / "False", tmp_path / "True"


def same(one, other):
    """Repeats are allowed: NaN is not equal to itself."""
    assert str(recorded(one)) == str(recorded(other))
    assert helpers.checkpoints(one) == helpers.checkpoints(other)
    for step in helpers.checkpoints(one):
        one_step, other_step = one / f"model_{step}", other / f"model_{step}"
        assert helpers.different_tensors(one_step, other_step) == []
        assert str(helpers.counters(one_step)) == str(helpers.counters(other_step))


@pytest.mark.parametrize("method", METHODS)
def test_skipped_updates_and_saves_are_those_of_a_run_that_reads_at_once(command, tmp_path, monkeypatch, method):
    def act(argv):
        with poison(monkeypatch, {3, 8, 9}):  # in the last before a save, too; 8 is a refresh
            assert helpers.run(argv) == 0

    monkeypatch.setattr("peft_pretraining.training.progress._LARGEST_SKIPPED_SHARE", 0.5)
    one, other = both(command, tmp_path, monkeypatch, act, **METHODS[method], skip_batches="6")
    same(one, other)
    assert [row["update_step"] - 1 for row in recorded(other) if row.get("skipped")] == [3, 6, 8, 9]


def test_rules_that_stack_matrices_round_otherwise(command, tmp_path, monkeypatch):
    """Masked updates of Online Subspace Descent multiply matrices of one shape together."""

    def act(argv):
        with poison(monkeypatch, {3}):
            assert helpers.run(argv) == 0

    monkeypatch.setattr("peft_pretraining.training.progress._LARGEST_SKIPPED_SHARE", 0.5)
    settings = {"method": "online_subspace_descent", "rank": 4, "dtype": "float64"}
    one, other = (
        helpers.tensors(folder / "model_15") for folder in both(command, tmp_path, monkeypatch, act, **settings)
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: n + text)


def test_updates_are_left_to_the_device(command, tmp_path, monkeypatch):
    """Otherwise the tests here compare a way with itself."""
    from peft_pretraining.training import loop

    at_once, masked = [], []
    late(monkeypatch)

    def watch(name, seen):
        real = getattr(loop, name)

        def watched(run, update, values):
            seen.append(update.step)
            return real(run, update, values)

        monkeypatch.setattr(loop, name, watched)

    watch("step_if_usable", at_once)
    watch("step_by_mask", masked)
    assert helpers.run(command(**QUICK)) == 0
    assert (at_once, masked) == ([], list(range(15)))
    masked.clear()
    assert helpers.run(command(**QUICK, skip_spikes=5, save_dir=tmp_path / "skips")) == 0
    assert (at_once, masked) == (list(range(15)), [])


def test_a_gradient_alone_that_is_not_finite(command, tmp_path, monkeypatch):
    def act(argv):
        with poison(monkeypatch, {3}, poisoned_gradient):
            assert helpers.run(argv) == 0

    monkeypatch.setattr("peft_pretraining.training.progress._LARGEST_SKIPPED_SHARE", 0.5)
    same(*both(command, tmp_path, monkeypatch, act, **METHODS["galore"]))


def test_spikes_are_observed_in_order(command, tmp_path, monkeypatch, soon):  # noqa: F811
    def act(argv):
        with bad_batches((54, 59)):
            assert helpers.run(argv) == 0

    settings = {"num_training_steps": 62, "save_every": 55, "eval_every": 100}
    one, other = both(command, tmp_path, monkeypatch, act, **settings)
    same(one, other)
    assert any("spike" in row for row in recorded(other))


def test_a_run_that_is_asked_to_stop_does_so_one_update_later_and_goes_on_as_if_it_had_not(
    command, tmp_path, monkeypatch
):
    late(monkeypatch)
    settings = {**QUICK, **METHODS["galore"], "save_every": 100}
    assert helpers.run(command(**settings, save_dir=tmp_path / "undisturbed")) == 0
    with before_update(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert helpers.run(command(**settings)) == helpers.REQUEUE
    assert helpers.checkpoints(tmp_path / "run") == [7]
    assert helpers.run([*command(**settings), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_too_many_updates_that_are_not_finite_end_the_run(command, tmp_path, monkeypatch, capsys):
    """The same number of them is counted, though one more has begun by then."""
    late(monkeypatch)
    with poison(monkeypatch, set(range(3, 15))):
        assert helpers.run(command(**{**QUICK, "save_every": 100, "eval_every": 100})) == 1
    assert "more than 5%" in capsys.readouterr().err
    assert [row["update_step"] for row in recorded(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


def test_going_back_goes_on_from_where_the_data_stands(command, tmp_path, monkeypatch):
    late(monkeypatch)
    settings = {**QUICK, **METHODS["galore"], "rewind_on_nan": 1, "num_training_steps": 12}
    with helpers.spoil_weights(6):
        assert helpers.run(command(**settings)) == 0
    counters = helpers.counters(tmp_path / "run" / "model_12")
    (rewind,) = counters["rewinds"]
    assert rewind["to_update"] == 5
    steps = [row["update_step"] for row in recorded(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 13))


def test_a_batch_without_targets_in_between(command, tmp_path, monkeypatch):
    """Its record comes after that of the update before, which is read then."""
    from peft_pretraining.training import loop

    real = loop.forward_backward

    def act(argv):
        with monkeypatch.context() as patch:

            def nothing(run, micro_batches):
                return None if run.state.update_step in (4, 5) else real(run, micro_batches)

            patch.setattr(loop, "forward_backward", nothing)
            assert helpers.run(argv) == 0

    one, other = both(command, tmp_path, monkeypatch, act)
    same(one, other)
    assert [row["update_step"] for row in recorded(other) if row.get("empty")] == [5, 6]


@pytest.mark.slow
def test_two_ranks_read_late_and_stop_together(command, tmp_path):
    """A loss that is not finite on one rank alone, and a request to stop of which the other hears with the numbers."""
    cases = {
        "at once": {"poison": [1, 3]},
        "late": {"poison": [1, 3], "late": True},
        "per layer, at once": {"per_layer": True, "poison": [1, 3]},
        "per layer, late": {"per_layer": True, "poison": [1, 3], "late": True},
        "undisturbed": {"late": True},
        "stopped": {"late": True, "signal": [1, 5], "to": "resumed"},
        "resumed": {"late": True, "to": "resumed"},
    }

    def case(name, to=None, per_layer=None, **how):
        settings = {**QUICK, **GALORE, "update_proj_gap": 4, "num_training_steps": 20, "per_layer": per_layer}
        argv = command(**settings, total_batch_size=16, save_dir=tmp_path / (to or name))
        return {**how, "argv": [*argv, *(RESUME if name == "resumed" else ())]}

    (tmp_path / "cases.json").write_text(json.dumps([case(name, **how) for name, how in cases.items()]))
    launched = subprocess.run(
        [*TORCHRUN, helpers.__file__, str(tmp_path / "cases.json")],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT},
        **{"capture_output": True, "text": True, "timeout": 240},
    )
    assert launched.returncode == 0, helpers.last_words(launched.stderr)
    for rank in (0, 1):
        reports = json.loads((tmp_path / f"rank{rank}.json").read_text())
        codes = dict(zip(cases, [report["exit_code"] for report in reports], strict=True))
        assert codes == {name: helpers.REQUEUE if name == "stopped" else 0 for name in cases}
    same(tmp_path / "at once", tmp_path / "late")
    same(tmp_path / "per layer, at once", tmp_path / "per layer, late")
    helpers.assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")


def test_a_copy_is_of_what_was_there():
    from peft_pretraining.optim.tensors.late_copy import LateCopy

    tensor = torch.tensor([1.5, float("inf")], dtype=torch.float64)
    copy = LateCopy(tensor)
    tensor.zero_()
    assert copy.tolist() == [1.5, float("inf")]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full_rank", "galore", "lora", "per_layer"])
def test_a_gpu_is_not_waited_for(command, monkeypatch, method):
    """torch raises an error at whatever waits in an ordinary update; the third one chooses no kernels any more."""
    from peft_pretraining.training import loop

    real, watched = loop.train_step, []

    def train_step(run, micro_batches, stop):
        ordinary = 2 < run.state.update_step < 7
        watched.extend([run.state.update_step] * ordinary)
        torch.cuda.set_sync_debug_mode("error" if ordinary else "default")
        try:
            return real(run, micro_batches, stop)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", train_step)
    settings = {**METHODS[method], "update_proj_gap": None if method in ("full_rank", "lora") else 100}
    staggered = {"stagger_refresh": False} if method == "per_layer" else {}
    quick = {**QUICK, "eval_every": 100, "save_every": 100, "num_training_steps": 8}
    assert helpers.run(command(**{**quick, **settings, **staggered})) == 0
    assert watched == [3, 4, 5, 6]
