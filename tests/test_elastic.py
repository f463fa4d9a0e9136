"""A run that changes its number of devices, or how it is divided over them: the same samples, the same losses."""

from __future__ import annotations

import helpers
import pytest
from conftest import write_blocks, write_model
from helpers import RESUME, stop_after
from launching import launch
from test_layouts import FSDP, command

EXACT = 1e-5
METHODS = {
    "full_rank": {},
    "galore": {"method": "galore", "rank": 4, "update_proj_gap": 5},
    "descent": {"method": "online_subspace_descent", "rank": 4, "update_proj_gap": 5},
    "relora": {"method": "relora", "rank": 4, "lora_alpha": 4, "relora": 4},
    "switchlora": {
        **{"method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2},
        **{"switch_lora_descent_rate": 0.9, "check_rank_sync": 3},
    },
    "golore_adapter": {"method": "golore_adapter", "rank": 4, "update_proj_gap": 5, "rand_ratio": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    write_blocks(folder / "data")
    write_model(folder / "llama.json")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [{}, FSDP], ids=["ddp", "fsdp"])
def test_from_one_to_two_to_four_to_one(folder, distributed):
    kind = "fsdp" if distributed else "ddp"

    def argv(name, batch_size, **flags):
        return command(folder, f"{kind} {name}", dtype="float32", batch_size=batch_size, **flags)

    for name, flags in METHODS.items():
        assert helpers.run(argv(f"undisturbed {name}", 8, **flags)) == 0
        stop_after(2, argv(name, 8, **flags))
    for processes, last in ((2, 4), (4, 8)):
        cases = [
            {"argv": [*argv(name, 8 // processes, **flags, **distributed), *RESUME], "signal": [0, last - 1]}
            for name, flags in METHODS.items()
        ]
        launch(folder / f"{kind} {processes}", processes, cases)
    for name, flags in METHODS.items():
        assert helpers.run([*argv(name, 8, **flags), *RESUME]) == 0
        moved, stayed = folder / f"{kind} {name}", folder / f"{kind} undisturbed {name}"
        assert helpers.checkpoints(moved) == [2, 4, 8, 12]
        assert [helpers.counters(moved / f"model_{step}")["world_size"] for step in (2, 4, 8, 12)] == [1, 2, 4, 1]
        assert_same_losses(moved, stayed)
        last = helpers.counters(moved / "model_12")["data_position"]
        assert last == helpers.counters(stayed / "model_12")["data_position"] == 12 * 8


def assert_same_losses(moved, stayed):
    """And rates and gradient norms, of every update once."""
    assert [row[0] for row in helpers.updates(moved)] == list(range(1, 13))
    for row, expected in zip(helpers.updates(moved), helpers.updates(stayed), strict=True):
        assert row[1:] == pytest.approx(expected[1:], abs=EXACT), f"{moved.name}, update {row[0]}"


@pytest.mark.slow
def test_from_ddp_to_fsdp_and_back(folder):
    def argv(name, batch_size, **flags):
        return command(folder, f"changing {name}", dtype="float32", batch_size=batch_size, **flags)

    cases = []
    for name, flags in METHODS.items():
        assert helpers.run(argv(f"undisturbed {name}", 8, **flags)) == 0
        for distributed, stop in (({}, 4), (FSDP, 9), ({}, None)):
            case = {"argv": [*argv(name, 4, **flags, **distributed), *RESUME]}
            cases.append(case if stop is None else {**case, "signal": [0, stop - 1]})
    launch(folder / "changing", 2, cases)
    for name in METHODS:
        assert helpers.checkpoints(folder / f"changing {name}") == [4, 9, 12]
        assert_same_losses(folder / f"changing {name}", folder / f"changing undisturbed {name}")
