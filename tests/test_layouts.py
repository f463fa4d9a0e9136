"""Every method on every layout of devices: one process, DDP, FSDP2 and HSDP end with the same weights.

One launch per layout makes all runs: starting processes costs more than training.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

import gpu_tier
import helpers
import pytest
import torch
from conftest import write_blocks, write_model
from launching import launch
from safetensors.torch import load_file

from peft_pretraining.export import merged_model
from peft_pretraining.training import loop

pytestmark = pytest.mark.timeout(600)  # one launch makes all the runs of a layout
# The leading singular values of these gradients are well apart. Where they are not, a basis turns by what rounding
# leaves divided by their distance: at rank 16 final weights differ by 3e-9.
PROJECTED = {"rank": 4, "update_proj_gap": 6}
WHOLE_BLOCKS = {"rank": 16, "update_proj_gap": 6}  # of 256 numbers on each of four devices
METHODS = {
    "full_rank": {"method": "full_rank"},
    "full_rank sgd": {"optimizer": "sgd", "lr": 0.1},
    "full_rank adafactor": {"optimizer": "adafactor"},
    "galore": {"method": "galore", **PROJECTED},
    "galore exact, full": {"method": "galore", "svd_method": "exact", "proj_type": "full", **PROJECTED},
    "galore per layer": {"optimizer": "galore_adamw_per_layer", "stagger_refresh": False, **PROJECTED},
    "golore": {"method": "golore", "rand_ratio": 0.5, **PROJECTED},
    "descent": {"method": "online_subspace_descent", **PROJECTED},
}
# Merges before updates 4 and 8, refreshes at 0, 4 (by SVD) and 8 (random), switches in most updates. No even number of
# devices divides the 177 inputs of one layer of a block.
FACTORS = {
    "lora": {"method": "lora", "rank": 4, "lora_alpha": 4, "lora_plus_ratio": 4, "weight_decay": 0.1},
    "relora": {
        **{"method": "relora", "rank": 4, "lora_alpha": 4, "relora": 4, "optimizer_random_pruning": 0.5},
        "model": "uneven.json",
    },
    "switchlora": {
        **{"method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2},
        **{"switch_lora_descent_rate": 0.9, "weight_decay": 0.1, "check_rank_sync": 5},
    },
    "golore_adapter": {
        **{"method": "golore_adapter", "rank": 4, "update_proj_gap": 4, "rand_ratio": 0.5},
        **{"refresh_accumulation": 2, "check_rank_sync": 5},
    },
}
FLOAT32 = {f"{name}, float32": {**flags, "dtype": "float32"} for name, flags in FACTORS.items()}
UNEVEN = {
    "golore_adapter sgd": {
        **{"method": "golore_adapter", "optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "rank": 4},
        **{"update_proj_gap": 4, "rand_ratio": 0.5, "model": "uneven.json"},
    },
}
VARIANTS = {
    "full_rank fused loss": {"method": "full_rank", "fused_loss": "on"},
    "full_rank lion": {"optimizer": "lion"},
    "galore reverse": {"method": "galore", "proj_type": "reverse_std", **PROJECTED},
    "galore left, staggered": {
        **{"method": "galore", "proj_type": "left", "stagger_refresh": True, "svd_method": "subspace"},
        **PROJECTED,
    },
    "galore adafactor": {"optimizer": "galore_adafactor", "beta1": 0.9, **PROJECTED},
    "galore lion": {"optimizer": "galore_lion", **PROJECTED},
    "golore sgd": {"optimizer": "golore_sgd", "rand_ratio": 0, "lr": 0.1, **PROJECTED},
    "descent, random": {"method": "online_subspace_descent", "proj_type": "random", **PROJECTED},
    "lora only": {"method": "lora", "rank": 4, "lora_alpha": 4, "lora_only": True},
    "relora by magnitude": {
        **{"method": "relora", "rank": 4, "lora_alpha": 4, "relora": 4, "optimizer_magnitude_pruning": 0.8},
        **{"scheduler": "cosine_restarts", "restart_warmup_steps": 1, "warmup_steps": 1, "model": "uneven.json"},
    },
    "switchlora at random": {
        **{"method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2},
        **{"switch_lora_descent_rate": 0.9, "discontinuous_switch": True, "switch_lora_drop": 0.3},
        **{"cal_delta_norm": True},
    },
    "golore_adapter staggered": {
        **{"method": "golore_adapter", "rank": 4, "update_proj_gap": 4, "rand_ratio": 0.5, "svd_method": "exact"},
        **{"stagger_refresh": True, "activation_checkpointing": True},
    },
}
PRECISIONS = {
    f"{name}, {precision}": {
        **{**METHODS, **FACTORS}[name],
        "dtype": "auto",
        "precision": precision,
        "clip_grad_norm": 0,
        "reduce_low_rank": False,
    }
    for name in ("full_rank", "galore", "lora")
    for precision in ("mixed", "bf16_sr")
}
ALWAYS = {**METHODS, **FACTORS, **UNEVEN}
FLOAT32_TOO = {
    f"{name}, float32": {**METHODS[name], "dtype": "float32"} for name in ("full_rank", "galore", "golore", "descent")
}
STOPS = (4, 9)
"""Updates after which runs are stopped: a merge or a refresh is the first thing that comes, or has just been; vectors
are frozen."""
EIGHT_BIT = {
    "full_rank 8-bit": {"optimizer": "adamw8bit"},
    "galore 8-bit": {"optimizer": "galore_adamw8bit", **WHOLE_BLOCKS},
    "golore 8-bit": {"optimizer": "golore_adamw8bit", "rand_ratio": 0.5, **WHOLE_BLOCKS},
    "lora 8-bit": {"method": "lora", "optimizer": "adamw8bit", "rank": 64, "lora_alpha": 64},
    "relora 8-bit": {
        **{"method": "relora", "optimizer": "adamw8bit", "rank": 64, "lora_alpha": 64, "relora": 4},
        "optimizer_magnitude_pruning": 0.5,
    },
    "golore_adapter 8-bit": {
        **{"method": "golore_adapter", "optimizer": "adamw8bit", "rank": 16, "update_proj_gap": 4, "rand_ratio": 0.5},
        "model": "square.json",
    },
}
QUICK = (
    *("full_rank adafactor", "galore per layer", "golore", *FACTORS, "switchlora, float32"),
    *("galore 8-bit", "golore_adapter 8-bit", "galore, bf16_sr", "lora, mixed"),
)
"""What the fast tier compares; tests/conformance has float64 runs of other methods there, and `fsdp 2, all` all."""
PARTS_OF_BLOCKS = {
    "switchlora 8-bit": {**FACTORS["switchlora"], "optimizer": "adamw8bit", "rank": 32, "model": "wide.json"},
}
"""Blocks of these vectors end where a device's part of them does: no run by one process has the same."""
STOPPED = ("relora", "switchlora", "golore_adapter", *PARTS_OF_BLOCKS)
FSDP = {"distributed_type": "fsdp"}
LAYOUTS = {
    "ddp 2": (2, {}),
    "fsdp 2": (2, FSDP),
    "fsdp 2, all": (2, FSDP),
    "fsdp 4": (4, {**FSDP, "reshard_after_forward": False}),
    "hsdp 2x2": (4, {**FSDP, "replicas": 2}),
}


def command(folder: Path, name: str, model: str = "llama.json", **changes) -> list[str]:
    settings = {
        **{"model_config": folder / model, "dataset_path": folder / "data", "save_dir": folder / name},
        **{"total_batch_size": 8, "lr": 3e-3, "num_training_steps": 12, "warmup_steps": 2, "workers": 0},
        **{"eval_every": 12, "save_every": 12, "dtype": "float64", **changes},
    }
    return [str(part) for flag, value in settings.items() for part in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    write_blocks(folder / "data")
    write_model(folder / "llama.json", hidden_size=64, intermediate_size=192)
    write_model(folder / "uneven.json", hidden_size=64, intermediate_size=177)
    write_model(folder / "square.json", hidden_size=256, intermediate_size=256)
    write_model(folder / "wide.json", hidden_size=128, intermediate_size=192)
    return folder


@contextlib.contextmanager
def rounded_gradients():
    """Gradients of bfloat16 weights that are rounded after micro-batches were added up, as with several devices."""
    compute = loop.forward_backward

    def rounded(run, micro_batches):
        sums = compute(run, micro_batches)
        for param in run.model.parameters():
            if param.grad is not None:
                param.grad.copy_(param.grad.to(param.dtype))
        return sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "forward_backward", rounded)
        yield


def one(folder: Path, name: str) -> Path:
    """The folder of a run by one process, which is made once."""
    made = folder / f"one {name}"
    if not made.exists():
        flags = {**ALWAYS, **FLOAT32, **EIGHT_BIT, **PRECISIONS, **VARIANTS, **FLOAT32_TOO}[name]
        size = 2 if name in PRECISIONS else 4  # micro-batches that are those of the layouts, or others
        with rounded_gradients() if "bf16_sr" in name else contextlib.nullcontext():
            assert helpers.run(command(folder, made.name, batch_size=size, **flags)) == 0
    return made


def runs_of(layout: str) -> dict[str, dict]:
    """Settings of the runs that a layout begins with, in their order."""
    runs = {**ALWAYS, **FLOAT32, **EIGHT_BIT, **PRECISIONS}
    if layout == "fsdp 2":
        return {name: flags for name, flags in runs.items() if name in QUICK or name in FLOAT32}
    return {**runs, **VARIANTS, **FLOAT32_TOO}


def launch_layout(folder: Path, layout: str) -> None:
    """Runs that a layout's tests look at: one launch for all of them."""
    processes, flags = LAYOUTS[layout]
    quick = layout == "fsdp 2"
    runs = {
        name: command(folder, f"{layout} {name}", batch_size=2, **flags, **own) for name, own in runs_of(layout).items()
    }
    cases = [{"argv": argv, "count": quick and name in FLOAT32} for name, argv in runs.items()]
    if quick:
        cases += [
            {"argv": command(folder, f"{layout} {name}", batch_size=2, **flags, **PARTS_OF_BLOCKS[name])}
            for name in PARTS_OF_BLOCKS
        ]
    for name in STOPPED if quick else ():
        own = {**FACTORS, **PARTS_OF_BLOCKS}[name]
        argv = command(folder, f"{layout} stopped {name}", batch_size=2, **flags, **own)
        argv += helpers.RESUME
        cases += [{"argv": argv, "signal": [1, updates - 1]} for updates in STOPS] + [{"argv": argv}]
    launch(folder / layout, processes, cases)


@pytest.fixture(scope="module")
def launch_once(folder) -> Callable[[str], None]:
    """Launches a layout the first time that a test asks for it, whatever the tests' order."""
    return functools.cache(lambda layout: launch_layout(folder, layout))


@pytest.fixture
def layout(request, launch_once):
    launch_once(request.param)
    return request.param


_LAYOUTS = [name if name == "fsdp 2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]


def in_layouts(methods):
    """Runs a test for each of some methods in every layout; the fast tier's has `QUICK` alone."""
    params = [
        pytest.param(layout, method, id=f"{method}-{layout}", marks=[pytest.mark.slow] * (layout != "fsdp 2"))
        for method in methods
        for layout in LAYOUTS
        if layout != "fsdp 2" or method in QUICK
    ]
    return pytest.mark.parametrize(("layout", "method"), params, indirect=["layout"])


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "fsdp 2"]
everywhere = pytest.mark.parametrize("layout", _LAYOUTS, indirect=True)
in_slow_layouts = pytest.mark.parametrize("layout", _SLOW, indirect=True)
in_two_parts = pytest.mark.parametrize("layout", ["fsdp 2"], indirect=True)


def reported(folder: Path, layout: str, rank: int) -> list[dict]:
    return json.loads((folder / layout / f"rank{rank}.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model_12" / "model.safetensors")


def assert_same_weights(folder: Path, layout: str, method: str) -> None:
    ours, expected = weights(folder / f"{layout} {method}"), weights(one(folder, method))
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            ours[name], expected[name], atol=1e-9, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_losses(folder: Path, layout: str, method: str) -> None:
    """And rates, and gradient norms."""
    ours, expected = helpers.updates(folder / f"{layout} {method}"), helpers.updates(one(folder, method))
    assert len(ours) == 12
    for row, target in zip(ours, expected, strict=True):
        assert row == pytest.approx(target, abs=1e-5)


@in_layouts(ALWAYS)
def test_final_weights_are_those_of_one_process(folder, layout, method):
    assert_same_weights(folder, layout, method)


@in_slow_layouts
@pytest.mark.parametrize("method", VARIANTS)
def test_final_weights_of_variants(folder, layout, method):
    assert_same_weights(folder, layout, method)


@in_layouts(EIGHT_BIT)
def test_8_bit_states_are_quantised_alike(folder, layout, method):
    """Blocks of 256 numbers lie on one device each. What differs by rounding may fall to the next of 256 values."""
    assert_same_weights(folder, layout, method)


@in_layouts(PRECISIONS)
def test_bfloat16_is_computed_alike(folder, layout, method):
    """With the same micro-batches products are the same, and gradients add up in float32 everywhere. Those of bfloat16
    weights are rounded once where several devices have averaged them; so are they here in the run by one process.

    Without clipping, and with whole gradients reduced: what differs in float32's last digit, as a norm over shards or
    a sum of projections does, turns some bfloat16 number, and all that follows."""
    ours, expected = weights(folder / f"{layout} {method}"), weights(one(folder, method))
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        narrow = "bf16_sr" in method and weight.ndim == 2
        assert weight.dtype == (torch.bfloat16 if narrow else torch.float32)
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    losses, alone = (helpers.updates(folder / name) for name in (f"{layout} {method}", f"one {method}"))
    assert [row[1] for row in losses] == pytest.approx([row[1] for row in alone], abs=1e-6)


@in_layouts(FLOAT32)
def test_losses_in_float32_are_those_of_one_process(folder, layout, method):
    assert_same_losses(folder, layout, method)


@in_slow_layouts
@pytest.mark.parametrize("method", FLOAT32_TOO)
def test_losses_of_the_other_methods_in_float32(folder, layout, method):
    assert_same_losses(folder, layout, method)


@pytest.mark.gpu
@pytest.mark.parametrize("method", {**METHODS, **FACTORS})
def test_a_gpu_trains_as_the_cpu(folder, method):
    with gpu_tier.on_cpu():
        expected = one(folder, method)
    ours = folder / f"gpu {method}"
    assert helpers.run(command(folder, ours.name, batch_size=4, **ALWAYS[method])) == 0
    for row, target in zip(helpers.updates(ours), helpers.updates(expected), strict=True):
        assert row == pytest.approx(target, abs=gpu_tier.LOSSES)
    theirs = weights(expected)
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, theirs[name], atol=gpu_tier.WEIGHTS, rtol=0, msg=lambda t, n=name: n + t)


@everywhere
def test_merges_switches_and_refreshes_took_place(folder, layout):
    """Or nothing above would have been shown."""
    saved = {name: helpers.tensors(folder / f"{layout} {name}" / "model_12") for name in ("lora", "relora")}
    frozen = "model.model.layers.0.self_attn.q_proj.weight"  # in both runs drawn alike
    assert (saved["lora"][frozen] - saved["relora"][frozen]).abs().max() > 1e-3
    records = helpers.records(folder / f"{layout} switchlora")
    assert sum(record.get("switched_vectors", 0) > 0 for record in records) > 8
    refreshed = [row["update_step"] for row in helpers.records(folder / f"{layout} golore_adapter") if
                 "refreshed_layers" in row]  # fmt: skip
    assert refreshed == [1, 5, 9]


@in_two_parts
@pytest.mark.parametrize("method", STOPPED)
def test_resuming_a_divided_run_changes_no_bit(folder, layout, method):
    moved = folder / f"{layout} stopped {method}"
    assert helpers.checkpoints(moved) == [*STOPS, 12]
    helpers.assert_same_run(moved, folder / f"{layout} {method}")
    if method in PARTS_OF_BLOCKS:
        dtypes = [value.dtype for value in helpers.tensors(moved / "model_12").values()]
        assert dtypes.count(torch.uint8) > 20
    if method.startswith("switchlora"):
        frozen = [value for name, value in helpers.tensors(moved / "model_4").items() if "switching.frozen" in name]
        assert sum(int(value.sum()) for value in frozen) > 0


@in_two_parts
@pytest.mark.parametrize("method", FACTORS)
def test_a_divided_run_is_exported_by_one_process(folder, layout, method):
    """From the parts in the training state, which are merged anew."""
    checkpoint = folder / f"{layout} {method}" / "model_12"
    exported, saved = merged_model(checkpoint, None).state_dict(), weights(folder / f"{layout} {method}")
    assert saved.keys() <= exported.keys()
    for name in saved:
        torch.testing.assert_close(exported[name], saved[name], atol=1e-14, rtol=0)


@in_two_parts
def test_what_devices_exchange_besides_what_fsdp2_does(folder, layout):
    """A merge gathers the 14 A, a switch the changed rows of all layers at once; a refresh averages 14 gradients, in
    each of two micro-batches, and twice as often where its basis is taken from two batches."""
    reports = dict(zip(runs_of(layout), reported(folder, layout, 0), strict=False))
    ordinary, *others = reports["lora, float32"]["collectives"]
    assert all(each == ordinary for each in others) and len(others) == 11

    def further(method, kind):
        counts = reports[f"{method}, float32"]["collectives"]
        return [count.get(kind, 0) - ordinary.get(kind, 0) for count in counts]

    gathers, scatters = "all_gather_into_tensor", "reduce_scatter_tensor"
    switched = [row["switched_vectors"] for row in helpers.records(folder / f"{layout} switchlora, float32") if
                "switched_vectors" in row]  # fmt: skip
    assert further("relora", gathers) == [14 * (update in (4, 8)) for update in range(12)]
    assert further("switchlora", gathers) == [int(count > 0) for count in switched]
    assert (
        further("golore_adapter", gathers) == further("relora", scatters) == further("switchlora", scatters) == [0] * 12
    )
    assert further("golore_adapter", scatters) == [{0: 56, 4: 56, 8: 28}.get(update, 0) for update in range(12)]
    checks = [update % 5 == 0 for update in range(12)]  # of the ranks: sums of the parts, and two means
    assert further("switchlora", "allreduce") == [3 * check for check in checks]
    for kind in ("allgather_base", "reduce_scatter_base"):  # FSDP2's own
        assert further("relora", kind) == further("switchlora", kind) == [0] * 12


@in_two_parts
def test_each_of_two_devices_has_half_of_weights_factors_and_pools(folder, layout):
    whole = {
        name.removeprefix("model."): value.numel() * value.element_size()
        for name, value in helpers.tensors(folder / f"{layout} switchlora" / "model_12").items()
        if name.startswith("model.")
    }
    halves = (".weight", ".lora_A", ".lora_B", ".candidates_A", ".candidates_B")
    replicated = ("selected_A", "selected_B", "pointers", "frozen_A", "frozen_B")
    for rank in range(2):
        held = reported(folder, layout, rank)[list(runs_of(layout)).index("switchlora")]["local_bytes"]
        assert held.keys() == whole.keys() and len(held) == 14 * (3 + 7) + 7  # 14 layers; norms, embedding and head
        for name, size in held.items():
            assert name.endswith((*halves, *replicated)), name
            assert size * (2 if name.endswith(halves) else 1) == whole[name], name
