"""Real runs of every update rule with every kind of basis, and what they record at refreshes."""

from __future__ import annotations

import helpers
import pytest
from helpers import GALORE

QUICK = {"eval_tokens": 64, "eval_every": 100}
RATES = {"adamw": 1e-2, "adamw8bit": 1e-2, "adafactor": 1e-2, "lion": 3e-3, "sgd": 3.0}
GALORE_SIDES = ("std", "reverse_std", "left", "right", "full")
SUBSPACE_DESCENT = (
    *("random", "continuous", "continuous_adam8bit", "continuous_lion", "continuous_adafactor", "continuous_sgd"),
)


ONE_UPDATE = {**QUICK, "num_training_steps": 1, "warmup_steps": 0}


def losses(folder) -> list[float]:
    return [loss for _, loss, _, _ in helpers.updates(folder)]


@pytest.fixture
def train(command, tmp_path):
    """A function: six updates with these settings; their losses."""

    def run(name: str, rule: str, **changes) -> list[float]:
        flags = {"num_training_steps": 6, "warmup_steps": 0, "optimizer": rule, "lr": RATES[rule], **changes}
        flags |= {**QUICK, "save_dir": tmp_path / name, "batch_size": 8}
        assert helpers.run(command(**flags)) == 0
        return losses(tmp_path / name)

    return run


def assert_it_learns(values: list[float], what: str) -> None:
    assert len(values) == 6 and values[-1] < values[0] - 0.05 and values[0] < 4.9, (what, values)


@pytest.mark.parametrize("rule", RATES)
def test_every_rule_trains_in_every_kind_of_subspace(train, rule):
    """The bases' own optimizers all with AdamW; with the other rules the basic kinds."""
    kinds = {"galore": {"method": "galore"}, "golore": {"method": "golore", "rand_ratio": 0.5}}
    descent = SUBSPACE_DESCENT if rule == "adamw" else ("random", "continuous")
    kinds |= {kind: {"method": "online_subspace_descent", "proj_type": kind} for kind in descent}
    sides = GALORE_SIDES[1:] if rule == "adamw" else ("full",)
    kinds |= {side: {"method": "galore", "proj_type": side} for side in sides}
    seen = {}
    for kind, flags in kinds.items():
        seen[kind] = train(kind, rule, **flags, rank=8, update_proj_gap=2)
        assert_it_learns(seen[kind], kind)
    # Each kind is a different run: no projection type falls back to another one.
    assert len({tuple(values) for values in seen.values()}) == len(seen)


@pytest.mark.parametrize("rule", [*RATES, "adam_zero"])
def test_every_rule_trains_full_rank(train, rule, monkeypatch):
    monkeypatch.setitem(RATES, "adam_zero", 1e-2)
    monkeypatch.setitem(RATES, "sgd", 1.0)
    seen = train("full", rule)
    assert_it_learns(seen, rule)
    if rule == "adam_zero":  # with one process there is nothing to shard
        assert seen == train("adamw", "adamw")
    if rule == "adamw8bit":
        assert seen == pytest.approx(train("adamw", "adamw"), abs=0.05)


@pytest.mark.parametrize("method", ["galore", "golore"])
def test_8_bit_moments_train_nearly_as_32_bit_ones(train, method):
    """Also where GoLore carries them into new bases."""
    changes = {"method": method, "rank": 8, "update_proj_gap": 2, **({"rand_ratio": 0} if method == "golore" else {})}
    assert train("8", "adamw8bit", **changes) == pytest.approx(train("32", "adamw", **changes), abs=0.05)


def test_settings_reach_the_optimizer(train):
    """Each of these changes the run: none is parsed and forgotten."""
    base = {"method": "golore", "rand_ratio": 0.5, "rank": 4, "update_proj_gap": 2, "num_training_steps": 4}
    settings = {
        "adamw": ({"adam_eps": 1e-3}, {"adam_beta1": 0.5}, {"adam_beta2": 0.5}, {"weight_decay": 0.5}, {"scale": 0.5}),
        "adafactor": ({"beta1": 0.9},),
        "sgd": ({"momentum": 0.5}, {"dampening": 0.5}),
    }
    settings["adamw"] += ({"rank": 5}, {"update_proj_gap": 3}, {"rand_ratio": 0}, {"proj_type": "left"}, {"seed": 1})
    settings["adamw"] += ({"stagger_refresh": True}, {"refresh_accumulation": 2}, {"target_modules": "mlp"})
    for rule, changes in settings.items():
        plain = train(f"{rule} plain", rule, **base)
        for change in changes:
            assert train(f"{rule} {change}", rule, **{**base, **change}) != plain, change


def test_clipping_looks_at_projected_gradients_unless_told_otherwise(command, tmp_path):
    norms = {}
    for clip_norm in ("projected", "full"):
        flags = {**GALORE, "rank": 1, "clip_norm": clip_norm, **ONE_UPDATE, "save_dir": tmp_path / clip_norm}
        assert helpers.run(command(**flags)) == 0
        ((_, _, _, norms[clip_norm]),) = helpers.updates(tmp_path / clip_norm)
    assert norms["projected"] < norms["full"]


# Records.

AT_FIRST = {"captured_energy_mean", "captured_energy_min", "refreshed_layers"}
AT_REFRESHES = AT_FIRST | {"basis_overlap_mean", "basis_overlap_min"}
ALL = AT_REFRESHES | {"failed_refreshes"}


@pytest.mark.parametrize(
    "flags, refreshes",
    [
        ({"method": "galore"}, [1, 4, 7]),
        ({"method": "galore", "svd_method": "randomized"}, [1, 4, 7]),
        ({"method": "galore", "update_proj_gap": 0}, [1]),
        ({"method": "golore", "rand_ratio": 0, "projected_backward": "off"}, [1, 4, 7]),
        ({"method": "online_subspace_descent", "proj_type": "random"}, [1, 4, 7]),
        ({"method": "online_subspace_descent"}, [1]),
        ({"method": "galore", "per_layer": True, "stagger_refresh": False}, [1, 4, 7]),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_metrics_appear_at_refreshes_only(command, tmp_path, flags, refreshes):
    assert helpers.run(command(**{**QUICK, "rank": 4, "update_proj_gap": 3, "num_training_steps": 8, **flags})) == 0
    records = {record["update_step"]: record for record in helpers.records(tmp_path / "run") if "loss" in record}
    assert {step: set(record) & ALL for step, record in records.items() if set(record) & ALL} == {
        step: AT_FIRST if step == 1 else AT_REFRESHES for step in refreshes
    }
    for step in refreshes:
        record = records[step]
        assert record["refreshed_layers"] == 14
        assert 0 < record["captured_energy_min"] <= record["captured_energy_mean"] <= 1 + 1e-6
        if step > 1:
            assert 0 <= record["basis_overlap_min"] <= record["basis_overlap_mean"] <= 1 + 1e-6
    energies = [records[step]["captured_energy_mean"] for step in refreshes]
    random = flags.get("rand_ratio") == 0 or flags.get("proj_type") == "random"
    # The best four directions of 32, or on average 4/32 of the energy.
    assert all(energy < 0.2 for energy in energies) if random else all(energy > 0.3 for energy in energies)


def test_a_random_refresh_of_a_projected_backward_pass_knows_no_energy(command, tmp_path):
    """It never sees the whole gradient."""
    flags = {"method": "golore", "rand_ratio": 0, "projected_backward": "on", "rank": 4, "update_proj_gap": 3}
    assert helpers.run(command(**{**QUICK, "num_training_steps": 4, **flags})) == 0
    records = {record["update_step"]: record for record in helpers.records(tmp_path / "run") if "loss" in record}
    energy = {"captured_energy_mean", "captured_energy_min"}
    assert {step: set(record) & ALL for step, record in records.items() if set(record) & ALL} == {
        1: AT_FIRST - energy,
        4: AT_REFRESHES - energy,
    }
