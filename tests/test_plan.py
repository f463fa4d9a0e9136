"""`python -m peft_pretraining.report.plan`: its command line, its numbers against formulas and real tensors."""

from __future__ import annotations

import json
import subprocess
import sys

import footprint
import helpers
import pytest
import torch
from conftest import write_model
from test_communication import AGREED, DENSE, FLOAT, GRAM, LOW_RANK, PROJECTED, RANK, WHOLE

from peft_pretraining.methods import load_method
from peft_pretraining.report import plan
from peft_pretraining.report.footprint.drive import Simulation
from peft_pretraining.report.footprint.planning import make_plan
from peft_pretraining.runtime.devices import DEVICES, GIB
from peft_pretraining.training.loop import state_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("plan") / "llama.json"))


def flags(model, *more):
    return ["--model_config", model, "--batch_size", "2", "--total_batch_size", "8", "--max_length", "16", *more]


def planned(tmp_path, argv, capsys):
    """What the command prints, and its JSON."""
    file = tmp_path / "plan.json"
    assert plan.main([*argv, "--json", str(file)]) == 0
    return capsys.readouterr().out, json.loads(file.read_text())


def test_the_command_says_what_a_run_needs(model, tmp_path, capsys):
    galore = ("--method", "galore", "--rank", "4", "--precision", "bf16")
    said, written = planned(tmp_path, flags(model, *galore, "--device", "rtx4090"), capsys)
    assert "Largest micro-batch that fits" in said and "4 of them per update" in said
    assert [each["name"] for each in written["kinds"]] == ["first", "ordinary", "refresh", "evaluation", "saving"]
    for each in written["kinds"]:
        assert sum(each["components"].values()) == each["peak"] <= written["capacity"]
    ordinary, refresh = written["kinds"][1:3]
    assert sum(refresh["launches"].values()) > sum(ordinary["launches"].values())
    assert ordinary["exchanged"] == {} and written["fits"] is True
    assert written["tokens_per_second"] > 0 and written["hours"] > 0
    assert written["largest_micro_batch"] >= written["dividing_micro_batch"] == 8


@pytest.mark.slow
def test_the_recipe_of_7b_fits_a_card_of_24_gb(tmp_path, capsys):
    """32 micro-batches: the first update, ordinary ones, those that refresh a basis, and a save."""
    script = ["bash", str(helpers.PROJECT / "scripts" / "pretrain.sh"), "7b", "galore", "--dry_run", "--nproc", "1"]
    command = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    _, written = planned(tmp_path, [*command, "--device", "rtx4090", "--search", "no"], capsys)
    assert written["accumulation"] == 32 and written["fits"]
    assert {each["name"] for each in written["kinds"]} >= {"first", "ordinary", "refresh", "saving"}
    assert 20 * GIB < written["peak"] <= 22 * GIB


def test_the_largest_micro_batch_just_fits(model):
    """Memory is nearly linear in it: one more sequence in a hundred no longer fits."""
    config = footprint.config_of(method="full_rank", precision="bf16", batch_size=32, fused_loss="off")
    room = DEVICES["rtx3090"]
    found = make_plan(config, footprint.SHAPE, room, 1)
    largest = found.largest_micro_batch
    assert largest is not None

    def peak(size):
        with Simulation(config, footprint.SHAPE) as simulation:
            simulation.batch_size = size
            return simulation.update(0).peak

    assert peak(largest) <= found.capacity < peak(largest + largest // 100 + 2)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--devices", "0"], "--devices must be a whole number from 1 to 512, got '0'"),
        (["--devices", "513"], "--devices must be a whole number from 1 to 512, got '513'"),
        (["--device", "abacus"], "got 'abacus'"),
        (["--json"], "argument --json: expected one argument"),
        (["--rank", "four"], "--rank"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--model_name_or_path", "hub/model"], "contradict"),
        (["--json", "/no/such/folder/plan.json"], "cannot be written"),
    ],
)
def test_bad_input_is_refused_in_one_line(model, argv, said, capsys):
    assert plan.main(flags(model, "--method", "galore", "--search", "no", *argv)) == 2
    error = capsys.readouterr().err
    assert said in error and len([line for line in error.splitlines() if line.startswith("error")]) == 1


def test_a_whole_command_line_is_taken(model):
    launched = ["torchrun", "--nproc_per_node", "4", "--nnodes=2", "/some/torchrun_main.py", *flags(model)]
    _, run, devices = plan.split([*launched, "--device", "a100"])
    assert devices == 8 and run == flags(model)
    assert plan.split([*launched, "--devices", "3"])[2] == 3


def test_comparing_runs_does_not_import_it():
    code = "import sys, peft_pretraining.report.compare; sys.exit(any(n in sys.modules for n in {FORBIDDEN}))"
    forbidden = ("torch", "peft_pretraining.report.footprint")
    command = [sys.executable, "-c", code.format(FORBIDDEN=forbidden)]
    assert subprocess.run(command, cwd=helpers.PROJECT, timeout=120).returncode == 0


# Several devices: the formulas of docs/distributed.md.


def exchanged(model, layout, devices, method="galore"):
    """Bytes of an update with a refresh, and of one without."""
    shape = json.loads(open(model).read())
    settings = {"method": method, "precision": "fp32", "batch_size": 1, "devices": devices, **layout}
    if method != "full_rank":
        settings |= {"rank": RANK, "update_proj_gap": 5}
    config = footprint.config_of(**settings).replace(max_length=16)
    with Simulation(config, shape, devices) as simulation:
        refresh, _, ordinary = (simulation.update(step).counts.exchanged() for step in range(3))
    return refresh, ordinary


WHOLE_GRADIENTS = {"projected_backward": "off"}


@pytest.mark.parametrize("devices", [2, 8])
def test_ddp_exchanges_what_its_formula_says(model, devices):
    refresh, ordinary = exchanged(model, WHOLE_GRADIENTS, devices)
    assert ordinary == {"all_reduce": FLOAT * (DENSE + LOW_RANK)}
    assert refresh == {"all_reduce": FLOAT * (DENSE + PROJECTED)}


@pytest.mark.parametrize("devices", [2, 8])
def test_fsdp_exchanges_what_its_formula_says(model, devices):
    refresh, ordinary = exchanged(model, {"distributed_type": "fsdp", **WHOLE_GRADIENTS}, devices)
    assert ordinary == {"all_gather": 2 * WHOLE, "reduce_scatter": WHOLE}
    assert refresh == {**ordinary, "all_reduce": GRAM + AGREED}


@pytest.mark.parametrize("devices", [2, 8])
def test_projected_backward_passes_exchange_projected_gradients(model, devices):
    """With DDP refreshes average whole gradients besides, with FSDP2 instead."""
    refresh, ordinary = exchanged(model, {}, devices)
    assert ordinary == {"all_reduce": FLOAT * (DENSE + LOW_RANK)}
    assert refresh == {"all_reduce": FLOAT * (DENSE + LOW_RANK + PROJECTED)}
    refresh, ordinary = exchanged(model, {"distributed_type": "fsdp"}, devices)
    gathered = {"all_gather": 2 * WHOLE}
    assert ordinary == {**gathered, "reduce_scatter": FLOAT * DENSE, "all_reduce": FLOAT * LOW_RANK}
    assert refresh == {**gathered, "reduce_scatter": WHOLE, "all_reduce": GRAM + AGREED}


def test_replicas_exchange_their_shards(model):
    """HSDP: of each shard's gradient, once more over the copies of the model."""
    _, ordinary = exchanged(model, {"distributed_type": "fsdp", "replicas": 2}, 4, "full_rank")
    assert ordinary == {"all_gather": 2 * WHOLE, "reduce_scatter": WHOLE, "all_reduce": WHOLE // 2}


def test_512_devices_hold_a_512th(model):
    config = footprint.config_of(method="full_rank", precision="bf16", devices=512, distributed_type="fsdp")
    with Simulation(config, footprint.SHAPE, 512) as simulation:
        held = simulation.update(0).components
    weights = 2 * (2 * 32000 * 512 + 2 * (4 * 512 * 512 + 3 * 512 * 1376))
    assert weights / 512 <= held["weights"] <= 1.2 * weights / 512 + 2**18  # tables of the rotary embedding, blocks


# What is simulated, against what is allocated.


@pytest.mark.parametrize("method", ["full_rank", "galore", "lora", "golore_adapter"])
def test_states_take_what_they_really_take(model, method):
    from peft_pretraining.distributed import ProcessGroup
    from peft_pretraining.training.build_model import distributed_model

    shape = json.loads(open(model).read())
    config = footprint.config_of(method=method, precision="fp32", batch_size=1, rank=4)
    real = load_method(method)(config)
    built = distributed_model(config, shape, real, ProcessGroup(0, 1, 0, 1, torch.device("cpu")))
    optimizer = real.build_optimizer(built)
    with Simulation(config, shape) as simulation:
        simulated = simulation.run.optimizer
        assert state_bytes(simulated) == state_bytes(optimizer)
        held = sum(param.numel() * param.element_size() for param in simulation.run.model.parameters())
    assert held == sum(param.numel() * param.element_size() for param in built.parameters())


def test_the_peak_holds_every_state(model):
    config = footprint.config_of(method="full_rank", precision="bf16", batch_size=1)
    with Simulation(config, footprint.SHAPE) as simulation:
        held = simulation.update(1).components
        bytes_of_states = state_bytes(simulation.run.optimizer)
    assert bytes_of_states <= held["states"] <= bytes_of_states + 2**16


# Three micro-batches stand for any number.


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "galore", "per_layer": True, "activation_checkpointing": True},
        pytest.param({"method": "galore", "per_layer": True, "optimizer": "adamw8bit"}, marks=pytest.mark.slow),
        pytest.param({"method": "golore_adapter"}, marks=pytest.mark.slow),
        pytest.param({"method": "full_rank"}, marks=pytest.mark.slow),
    ],
)
def test_further_micro_batches_change_no_peak_and_cost_alike(settings, monkeypatch):
    from peft_pretraining.report.footprint import drive

    config = footprint.config_of(**settings, precision="bf16", batch_size=2, gradient_accumulation=5)

    def measured():
        with Simulation(config, footprint.SHAPE) as simulation:
            return [simulation.update(step) for step in range(2)]

    three = measured()
    monkeypatch.setattr(drive, "MICRO_BATCHES", 5)
    for few, all_of_them in zip(three, measured(), strict=True):
        assert few.peak == all_of_them.peak
        assert few.counts.launches() == all_of_them.counts.launches()
        assert few.counts.host_waits() == all_of_them.counts.host_waits()


def test_a_measured_peak_of_an_h200():
    """LLaMA 60M, 64 x 256 tokens, all in bfloat16: 9.16 GiB on the device, 9.06 with 8-bit states."""
    shape = json.loads((helpers.PROJECT / "configs" / "llama_60m.json").read_text())
    handles = 64 * footprint.MIB  # of cuBLAS, in two threads
    for more, gib in (({}, 9.16), ({"optimizer": "adamw8bit"}, 9.06)):
        settings = {
            "method": "full_rank",
            "precision": "bf16",
            "fused_loss": "off",
            "lean_layers": "off",
            "batch_size": 64,
            **more,
        }
        with Simulation(footprint.config_of(**settings), shape) as simulation:
            assert (simulation.update(0).peak + handles) / GIB == pytest.approx(gib, rel=0.02)
