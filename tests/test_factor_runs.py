"""Runs of the methods with low-rank factors through the trainer: resume, export, warm start, skipped updates."""

import sys

import helpers
import pytest
import torch
from factor_helpers import FACTORS
from helpers import RESUME, stop_after
from transformers import AutoModelForCausalLM

from peft_pretraining.config import ScheduleConfig, schedule
from peft_pretraining.methods.relora.method import ReLoRA
from peft_pretraining.methods.switchlora.method import SwitchLoRA
from peft_pretraining.nn import low_rank_layers
from peft_pretraining.training import build
from peft_pretraining.training import loop as train

sys.path.insert(0, str(helpers.PROJECT / "scripts"))

import export_merged

methods = pytest.mark.parametrize("name", FACTORS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return helpers.Undisturbed(tmp_path_factory)


# A freeze is under way after most updates of SwitchLoRA; ReLoRA merges, and GoLore takes a full gradient, in the
# updates 5, 10 and 15 (0-based): the first thing that a run resumed there does, or the last before it was stopped.
@pytest.mark.parametrize("updates", [5, 6, 13])
@methods
def test_resume_changes_no_bit(command, undisturbed, tmp_path, device, name, updates):
    stop_after(updates, command(**FACTORS[name]))
    assert helpers.run([*command(**FACTORS[name]), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **FACTORS[name]))


def test_resume_with_refreshes_that_are_staggered_and_read_more_batches(command, tmp_path):
    flags = {**FACTORS["golore_adapter"], "stagger_refresh": True, "refresh_accumulation": 2, "rand_ratio": 2}
    assert helpers.run(command(**flags, save_dir=tmp_path / "at once")) == 0
    stop_after(7, command(**flags))
    assert helpers.run([*command(**flags), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", tmp_path / "at once")
    refreshed = [row["refreshed_layers"] for row in helpers.records(tmp_path / "run") if "refreshed_layers" in row]
    assert refreshed[0] == 14 and max(refreshed[1:]) <= 3
    assert helpers.counters(tmp_path / "run" / "model_20")["data_position"] > 20 * 8


@methods
def test_activation_checkpointing_changes_nothing(command, undisturbed, tmp_path, name):
    """Also not the full gradients, which the recomputed forward pass must not add again."""
    assert helpers.run(command(**FACTORS[name], activation_checkpointing=True, num_training_steps=20)) == 0
    ours, reference = (helpers.updates(folder) for folder in (tmp_path / "run", undisturbed(command, **FACTORS[name])))
    for row, expected in zip(ours, reference, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def test_what_the_points_of_resuming_are(command, undisturbed):
    """At them something is frozen, merged, or about to be refreshed, or the test above would show nothing."""
    run = undisturbed(command, **FACTORS["switchlora"])
    for update in (10, 20):
        saved = helpers.tensors(run / f"model_{update}")
        assert sum(int(tensor.sum()) for name, tensor in saved.items() if "switching.frozen" in name) > 0
        assert sum(int(tensor.sum()) for name, tensor in saved.items() if "switching.pointers" in name) > 0
    assert sum(record.get("switched_vectors", 0) for record in helpers.records(run)) > 100
    run = undisturbed(command, **FACTORS["golore_adapter"])
    refreshed = [row["update_step"] for row in helpers.records(run) if "refreshed_layers" in row]
    assert refreshed == [1, 6, 11, 16]
    run = undisturbed(command, **FACTORS["relora"])
    assert [row[2] for row in helpers.updates(run)][10] == 0  # the update after a merge runs at rate 0


QUANTISED = {
    "4bit": {"method": "relora", "rank": 4, "relora": 5, "lora_alpha": 4, "quantize": "4bit"},
    "4bit twice": {"method": "lora", "rank": 4, "lora_alpha": 4, "quantize": "4bit", "use_double_quant": True},
    "8bit": {"method": "relora", "rank": 4, "relora": 5, "lora_alpha": 4, "quantize": "8bit"},
    "none": {"method": "lora", "rank": 8, "lora_alpha": 8, "lora_only": True},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_or_absent_weights_train_resume_and_are_exported(command, undisturbed, tmp_path, kind):
    stop_after(7, command(**QUANTISED[kind]))
    assert helpers.run([*command(**QUANTISED[kind]), *RESUME]) == 0
    reference = undisturbed(command, **QUANTISED[kind])
    helpers.assert_same_run(tmp_path / "run", reference)
    first, *_, last = (row[1] for row in helpers.evaluations(reference))
    assert last < first - 0.5
    saved = helpers.tensors(reference / "model_20")
    frozen = [value for name, value in saved.items() if name.startswith("model.") and name.endswith("_proj.weight")]
    codes = [value for name, value in saved.items() if name.endswith("_proj.quantized.codes")]
    assert (len(frozen), len(codes)) == (0, 0 if kind == "none" else 14)
    assert all(value.dtype == torch.uint8 for value in codes)
    # A run that starts from the export starts with the loss of the run that was exported.
    from_export = {"warmed_up_model": reference / "model_20", "save_dir": tmp_path / "from export"}
    assert helpers.run(command(**from_export, num_training_steps=21, warmup_steps=0)) == 0
    assert helpers.evaluations(tmp_path / "from export")[0][1] == pytest.approx(last, abs=1e-4)


def test_pools_on_the_device_and_a_check_of_the_ranks_change_no_bit(command, undisturbed, tmp_path):
    flags = {"no_offload_candidates": True, "check_rank_sync": 3, "cal_delta_norm": True}
    assert helpers.run(command(**FACTORS["switchlora"], **flags)) == 0
    reference = undisturbed(command, **FACTORS["switchlora"])
    assert helpers.different_tensors(tmp_path / "run" / "model_20", reference / "model_20") == []
    norms = [row["switch_delta_norm"] for row in helpers.records(tmp_path / "run") if "loss" in row]
    counts = [row["switched_vectors"] for row in helpers.records(tmp_path / "run") if "loss" in row]
    assert [norm > 0 for norm in norms] == [count > 0 for count in counts]


@methods
def test_wrapping_changes_nothing_at_first(command, undisturbed, name):
    """Initial evaluation and first loss are those of full-rank training."""
    full, run = (undisturbed(command, **flags) for flags in ({}, FACTORS[name]))
    assert helpers.evaluations(run)[0][1] == pytest.approx(helpers.evaluations(full)[0][1], abs=1e-5)
    assert helpers.updates(run)[0][1] == pytest.approx(helpers.updates(full)[0][1], abs=1e-5)
    assert helpers.evaluations(run)[-1][1] < helpers.evaluations(run)[0][1] - 0.5  # and it learns


@methods
def test_export_computes_what_was_trained(command, tmp_path, monkeypatch, name):
    """The checkpoint's own folder, and what `export_merged.py` makes of it, in any dtype."""
    trained, run_train = [], build.train

    def observed(run):
        code = run_train(run)
        trained.append(run)
        return code

    monkeypatch.setattr(build, "train", observed)
    assert helpers.run(command(**FACTORS[name], num_training_steps=10)) == 0
    (run,), checkpoint, tokens = trained, tmp_path / "run" / "model_10", torch.arange(64).reshape(2, 32)
    before = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
    run.method.merged_state_dict(run.model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in run.model.state_dict().items())
    with torch.no_grad():
        expected = run.model.eval()(tokens).logits

        plain = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert not any("lora" in key or "switching" in key for key in plain.state_dict())
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=0, atol=1e-5)
        for dtype, tolerance in ((None, 1e-5), ("float64", 1e-5), ("bfloat16", 0.1)):
            out = tmp_path / f"as {dtype}"
            assert export_merged.main([str(checkpoint), str(out), *(["--dtype", dtype] if dtype else [])]) == 0
            exported = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
            assert exported.dtype == getattr(torch, dtype or "float32")
            assert (out / "tokenizer_config.json").is_file() and not (out / "manifest.json").exists()
            torch.testing.assert_close(exported(tokens).logits.float(), expected, rtol=0, atol=tolerance)


def test_export_of_what_cannot_be_exported(command, undisturbed, tmp_path, capsys):
    run = undisturbed(command, **FACTORS["lora"])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert export_merged.main([str(tmp_path / "nowhere"), str(tmp_path / "used")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'nowhere'}: manifest.json is missing",
        f"error: {tmp_path / 'used'}: exists and is not an empty folder",
    ]
    assert export_merged.main([str(run / "model_10"), str(tmp_path / "out"), "--dtype", "float32"]) == 0


@methods
def test_evaluation_changes_no_weight(command, monkeypatch, name):
    evaluate, seen = train.evaluate, []

    def watched(model, *arguments):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        result = evaluate(model, *arguments)
        seen.append(all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()))
        return result

    monkeypatch.setattr(train, "evaluate", watched)
    assert helpers.run(command(**FACTORS[name], dtype="bfloat16", num_training_steps=5, eval_every=5)) == 0
    assert seen == [True, True]


def test_merges_are_counted_from_a_warm_start(command, undisturbed, tmp_path, monkeypatch):
    """After a full-rank checkpoint of 10 updates, merges come N updates later, and restarts coincide with them."""
    merges, restart = [], ReLoRA.restart_layer

    def watched(self, layer, step, index):
        merges.append((step, index))
        restart(self, layer, step, index)

    monkeypatch.setattr(ReLoRA, "restart_layer", watched)
    first = undisturbed(command)  # full rank
    flags = {**FACTORS["relora"], "relora": 6, "cycle_length": None}  # which follows from --relora
    argv = command(**flags, warmed_up_model=first / "model_10", num_training_steps=28)
    stop_after(15, argv)
    assert merges == []
    assert helpers.counters(tmp_path / "run" / "model_15")["method"] == {"start": 10}
    assert helpers.run([*argv, *RESUME]) == 0
    assert merges == [(step, index) for step in (16, 22) for index in range(14)]
    config = ScheduleConfig(
        num_training_steps=28, warmup_steps=2, cycle_length=6, scheduler="cosine_restarts", restart_warmup_steps=1
    )
    rates = [1e-2 * schedule.rate_multiplier(t, config, 18) for t in range(18)]
    assert [row[2] for row in helpers.updates(tmp_path / "run")] == rates
    assert rates[6] == rates[12] == 0
    assert helpers.evaluations(tmp_path / "run")[0] == helpers.evaluations(first)[1]


def test_a_merge_that_falls_on_a_skipped_update_takes_place(command, tmp_path):
    argv = command(**{**FACTORS["relora"], "lora_dropout": None}, skip_batches="5", save_every=1)
    assert helpers.run(argv) == 0
    before, after = (helpers.tensors(tmp_path / "run" / f"model_{update}") for update in (5, 6))
    changed = {name.split(".")[-1] for name in before if "proj" in name and not torch.equal(before[name], after[name])}
    assert {"weight", "lora_A", "lora_B"} <= changed
    exported = [name for name in before if name.startswith("exported")]
    assert max(float((before[name] - after[name]).abs().max()) for name in exported) < 1e-6


def test_a_skipped_update_switches_nothing(command, tmp_path):
    assert helpers.run(command(**FACTORS["switchlora"], skip_batches="3", save_every=1)) == 0
    run = tmp_path / "run"
    assert helpers.different_tensors(run / "model_3", run / "model_4") == []
    switched = {row["update_step"]: row["switched_vectors"] for row in helpers.records(run) if "loss" in row}
    assert switched[4] == 0 and switched[3] > 0


@pytest.mark.parametrize("flags", [{}, {"discontinuous_switch": True}, {"no_offload_candidates": True}])
def test_switching_keeps_the_function_in_every_update(command, monkeypatch, flags):
    switch, deviations = SwitchLoRA.before_step, []

    def watched(self, model, optimizer, step):
        before = {name: layer.merged_weight() for name, layer in low_rank_layers(model).items()}
        switch(self, model, optimizer, step)
        for name, layer in low_rank_layers(model).items():
            deviation = (layer.merged_weight() - before[name]).abs().max() / before[name].abs().max()
            deviations.append((optimizer.reported["switched_vectors"], float(deviation)))

    monkeypatch.setattr(SwitchLoRA, "before_step", watched)
    assert helpers.run(command(**FACTORS["switchlora"], dtype="float64", **flags)) == 0
    assert sum(switched for switched, _ in deviations) > 100
    assert max(deviation for _, deviation in deviations) < 1e-13
