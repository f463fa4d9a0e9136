"""Every method on every layout of devices: one process, DDP, FSDP2 and HSDP end with the same weights.

One launch per layout makes all runs: starting processes costs more than training.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from conftest import write_blocks, write_model
from safetensors.torch import load_file

# The leading singular values of these gradients are well apart. Where they are not, a basis turns by what rounding
# leaves divided by their distance: at rank 16 final weights differ by 3e-9.
PROJECTED = {"rank": 4, "update_proj_gap": 6}
WHOLE_BLOCKS = {"rank": 16, "update_proj_gap": 6}  # of 256 numbers on each of four devices
METHODS = {
    "full_rank": {"method": "full_rank"},
    "full_rank sgd": {"optimizer": "sgd", "lr": 0.1},
    "full_rank lion": {"optimizer": "lion"},
    "full_rank adafactor": {"optimizer": "adafactor"},
    "galore": {"method": "galore", **PROJECTED},
    "galore exact, full": {"method": "galore", "svd_method": "exact", "proj_type": "full", **PROJECTED},
    "galore reverse": {"method": "galore", "proj_type": "reverse_std", **PROJECTED},
    "galore left, staggered": {"method": "galore", "proj_type": "left", "stagger_refresh": True, **PROJECTED},
    "galore adafactor": {"optimizer": "galore_adafactor", "beta1": 0.9, **PROJECTED},
    "galore lion": {"optimizer": "galore_lion", **PROJECTED},
    "galore per layer": {"optimizer": "galore_adamw_per_layer", "stagger_refresh": False, **PROJECTED},
    "golore": {"method": "golore", "rand_ratio": 0.5, **PROJECTED},
    "golore sgd": {"optimizer": "golore_sgd", "rand_ratio": 0, "lr": 0.1, **PROJECTED},
    "descent": {"method": "online_subspace_descent", **PROJECTED},
    "descent, random": {"method": "online_subspace_descent", "proj_type": "random", **PROJECTED},
}
# Merges before updates 4 and 8, refreshes at 0, 4 (by SVD) and 8 (random), switches in every other update.
FACTORS = {
    "lora": {"method": "lora", "rank": 4, "lora_alpha": 4, "lora_plus_ratio": 4, "weight_decay": 0.1},
    "lora only": {"method": "lora", "rank": 4, "lora_alpha": 4, "lora_only": True},
    "relora": {"method": "relora", "rank": 4, "lora_alpha": 4, "relora": 4, "optimizer_random_pruning": 0.5},
    "relora by magnitude": {
        **{"method": "relora", "rank": 4, "lora_alpha": 4, "relora": 4, "optimizer_magnitude_pruning": 0.8},
        **{"scheduler": "cosine_restarts", "restart_warmup_steps": 1, "warmup_steps": 1, "model": "uneven.json"},
    },
    "switchlora": {
        **{"method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2},
        **{"switch_lora_descent_rate": 0.9, "weight_decay": 0.1, "check_rank_sync": 5},
    },
    "switchlora at random": {
        **{"method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2},
        **{"switch_lora_descent_rate": 0.9, "discontinuous_switch": True, "switch_lora_drop": 0.3},
        **{"cal_delta_norm": True},
    },
    "golore_adapter": {
        **{"method": "golore_adapter", "rank": 4, "update_proj_gap": 4, "rand_ratio": 0.5},
        **{"refresh_accumulation": 2, "check_rank_sync": 5},
    },
    "golore_adapter sgd": {
        **{"method": "golore_adapter", "optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "rank": 4},
        **{"update_proj_gap": 4, "rand_ratio": 0.5, "model": "uneven.json"},
    },
}
FLOAT32 = {f"{name}, float32": {**flags, "dtype": "float32"} for name, flags in FACTORS.items()}
EIGHT_BIT = {
    "full_rank 8-bit": {"optimizer": "adamw8bit"},
    "galore 8-bit": {"optimizer": "galore_adamw8bit", **WHOLE_BLOCKS},
    "golore 8-bit": {"optimizer": "golore_adamw8bit", "rand_ratio": 0.5, **WHOLE_BLOCKS},
}
FSDP = {"distributed_type": "fsdp"}
LAYOUTS = {
    "ddp 2": (2, {}),
    "fsdp 2": (2, FSDP),
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


def launch(folder: Path, processes: int, cases: list[dict]) -> None:
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launched = subprocess.run(
        [*torchrun, helpers.__file__, str(folder / "cases.json")],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT, "capture_output": True, "text": True},
        timeout=280,
    )
    assert launched.returncode == 0, launched.stderr[-30000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    write_blocks(folder / "data")
    write_model(folder / "llama.json", hidden_size=64, intermediate_size=192)
    for name, flags in {**METHODS, **EIGHT_BIT}.items():
        assert helpers.run(command(folder, f"one {name}", batch_size=4, **flags)) == 0
    return folder


@pytest.fixture(
    scope="module",
    params=[name if name == "fsdp 2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def layout(request, folder):
    processes, flags = LAYOUTS[request.param]
    cases = [
        {"argv": command(folder, f"{request.param} {name}", batch_size=2, **flags, **method)}
        for name, method in {**METHODS, **EIGHT_BIT}.items()
    ]
    launch(folder / request.param, processes, cases)
    return request.param


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model_12" / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_final_weights_are_those_of_one_process(folder, layout, method):
    one, many = weights(folder / f"one {method}"), weights(folder / f"{layout} {method}")
    assert one.keys() == many.keys()
    for name in one:
        torch.testing.assert_close(
            many[name], one[name], atol=1e-9, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("method", EIGHT_BIT)
def test_8_bit_states_are_quantised_alike(folder, layout, method):
    """Blocks of 256 numbers lie on one device each. What differs by rounding may fall to the next of 256 values."""
    one, many = weights(folder / f"one {method}"), weights(folder / f"{layout} {method}")
    for name in one:
        torch.testing.assert_close(
            many[name], one[name], atol=1e-9, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
