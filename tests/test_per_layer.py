"""Updates inside the backward pass: equal to ordinary ones, with no more gradients alive than the log announces."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import helpers
import pytest
import torch
from helpers import GALORE, poison, poisoned_gradient, refreshes, stop_after

from peft_pretraining.config import Config
from peft_pretraining.methods import load_method
from peft_pretraining.methods._projection import method as projection
from peft_pretraining.optim import LowRankOptimizer, PerLayerUpdates

QUICK = {"eval_tokens": 64, "eval_every": 100}
EXACT = {
    **QUICK,
    **{"dtype": "float64", "clip_grad_norm": 0, "num_training_steps": 10, "rank": 4, "update_proj_gap": 4},
}
RULES = {
    "adamw": {"lr": 1e-2, "weight_decay": 0.1},
    "sgd": {"lr": 1.0},
    "lion": {"lr": 1e-3, "weight_decay": 0.1},
    "adafactor": {"lr": 1e-2, "beta1": 0.9},
}
BASES = {
    "galore": {"method": "galore"},
    "golore": {"method": "golore", "rand_ratio": 0.4},  # random from update 4 on
    "full": {"method": "galore", "proj_type": "full"},
    "continuous": {"method": "online_subspace_descent", "proj_type": "continuous"},
}
ACCUMULATED = {"per_layer": True, "batch_size": 2}
WHOLE_FIRST_BASES = {"stagger_refresh": False}
"""So that the first bases come from the whole gradient, as in an ordinary run."""
PROJECTED, UNPROJECTED = 14, 5 * 32 + 2 * 128 * 32
"""Weights of the tiny model with a projection; elements of the others."""


def largest_difference(one, other) -> float:
    """Of all weights of two checkpoints."""
    a, b = helpers.tensors(one), helpers.tensors(other)
    weights = [name for name in a if name.startswith("model.")]
    assert len(weights) >= PROJECTED and a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in weights)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rule", RULES)
def test_equal_to_ordinary_updates(command, tmp_path, rule, basis):
    """With several refreshes; with and without accumulation; with recomputed activations."""
    changes = {**EXACT, **RULES[rule], **BASES[basis], **WHOLE_FIRST_BASES, "optimizer": rule}
    ways = {"accumulated": ACCUMULATED, "recomputed": {**ACCUMULATED, "activation_checkpointing": True}}
    ways["at once"] = {"per_layer": True, "batch_size": 8}
    if (rule, basis) not in (("adamw", "galore"), ("adamw", "continuous")):
        ways = {"accumulated": ACCUMULATED}
    assert helpers.run(command(**{**changes, "batch_size": 8, "save_dir": tmp_path / "ordinary"})) == 0
    for way, how in ways.items():
        assert helpers.run(command(**{**changes, **how, "save_dir": tmp_path / way})) == 0
        assert largest_difference(tmp_path / way / "model_10", tmp_path / "ordinary" / "model_10") < 1e-9
        rows, expected = helpers.updates(tmp_path / way), helpers.updates(tmp_path / "ordinary")
        assert [row[2] for row in rows] == [row[2] for row in expected]  # the same schedule
        for row, target in zip(rows, expected, strict=True):
            assert row[1:] == pytest.approx(target[1:], rel=1e-9)  # loss, and the norm over R and the rest
    last = refreshes(tmp_path / "accumulated" / "model_10")
    assert last == ({0} if basis == "continuous" else {8})


# What is alive.


@dataclass
class Watched:
    """What the hooks saw, in the order of the gradients' arrival."""

    peak: dict[int, int] = field(default_factory=dict)
    """Update -> most elements of gradients alive at a time: gradients, and sums of them."""
    whole: dict[int, int] = field(default_factory=dict)
    """Update -> projected weights whose full gradient was added up."""
    summed: set[int] = field(default_factory=set)
    """Updates that added up anything."""
    kept: int = 0
    """Gradients that a hook left at a last micro-batch."""
    announced: list[int] = field(default_factory=list)
    """Elements (of 4 bytes) that the log announces: in ordinary updates, in refreshing ones, without per-layer."""


@contextlib.contextmanager
def watched(monkeypatch):
    arrived, gradient_bytes, seen = PerLayerUpdates._arrived, projection.gradient_bytes, Watched()

    def announce(*args):
        announced = gradient_bytes(*args)
        seen.announced = [size // 4 for size in announced]
        return announced

    def wrapped(self, param, group, *rest):
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        step = self._optimizer.update_step
        gradients = [each.grad.numel() for each in params if each.grad is not None]
        alive = sum(gradients) + sum(each.numel() for each in self._sums.values())
        seen.peak[step] = max(seen.peak.get(step, 0), alive)
        arrived(self, param, group, *rest)
        if self._sums:
            seen.summed.add(step)
            whole = sum(total.shape == param.shape for param, total in self._sums.items())
            seen.whole[step] = max(seen.whole.get(step, 0), whole)
        seen.kept += param.grad is not None and self._index == self._count - 1

    with monkeypatch.context() as patch:
        patch.setattr(PerLayerUpdates, "_arrived", wrapped)
        patch.setattr(projection, "gradient_bytes", announce)
        yield seen


SMALL = {**QUICK, "rank": 2, "update_proj_gap": 7, "num_training_steps": 9, "method": "galore"}
SMALL |= {"projected_backward": "off"}  # its layers form no gradients that could be counted


def test_without_accumulation_one_gradient_is_alive(command, monkeypatch):
    with watched(monkeypatch) as seen:
        assert helpers.run(command(**SMALL, per_layer=True, batch_size=8)) == 0
    assert set(seen.peak.values()) == {128 * 32}  # the largest, refresh or not
    assert (seen.kept, seen.summed) == (0, set())


@pytest.mark.parametrize("method", ["galore", "golore"])
def test_with_accumulation_low_rank_gradients_are_added_up(command, monkeypatch, capsys, method):
    changes = {**SMALL, "method": method, **({"rand_ratio": 0.1} if method == "golore" else {})}
    with watched(monkeypatch) as seen:
        assert helpers.run(command(**changes, **ACCUMULATED)) == 0
    log = capsys.readouterr().err
    assert "the first bases come from the first micro-batch of update 0" in log
    assert seen.kept == 0 and seen.summed == set(range(9))
    # Two of 14 weights refresh, and add up G, in each update but the first; none where the basis is random.
    assert [seen.whole[step] for step in range(9)] == ([0] + [2] * 8 if method == "galore" else [0] * 9)
    low = 8 * 32 * 2 + 6 * 64 * 2  # R of 8 weights 32 x 32 and of 6 with a longer side of 64
    ordinary, refresh, whole = seen.announced
    assert ordinary == UNPROJECTED + low + 128 * 32 and whole == UNPROJECTED + 8 * 32 * 32 + 6 * 64 * 32
    # Bounds: the largest gradient is unprojected and so already counted, and not every refresh adds up G.
    assert ordinary - 128 * 32 <= seen.peak[0] <= ordinary
    assert max(seen.peak.values()) <= refresh <= ordinary + 2 * 64 * 32
    assert "gradients held at a time: about 0.1 MB in ordinary updates" in log


def test_full_gradients_are_added_up_where_they_are_needed(command, monkeypatch, tmp_path):
    """In updates that refresh all weights together, with online PCA, and for clipping by the full norm."""
    cases = {
        "together": ({"stagger_refresh": False}, {0, 7}),
        "online PCA": ({"method": "online_subspace_descent"}, set(range(9))),
        "full norm": ({"clip_norm": "full"}, set(range(9))),
    }
    for name, (changes, updates) in cases.items():
        argv = command(**{**SMALL, **ACCUMULATED, **changes, "save_dir": tmp_path / name})
        with watched(monkeypatch) as seen:
            assert helpers.run(argv) == 0
        assert {step for step, count in seen.whole.items() if count} == updates, name
        assert {seen.whole[step] for step in updates} == {PROJECTED}, name
        # Online PCA's is what an ordinary run holds; here as there one gradient is on its way to its sum.
        assert max(seen.peak.values()) <= seen.announced[1] + (64 * 32 if name == "online PCA" else 0), name


def test_the_first_bases_come_from_the_first_micro_batch(command, tmp_path):
    """They are those of a run whose first total batch is that micro-batch."""
    changes = {**EXACT, "method": "galore", "num_training_steps": 2, "save_every": 1}
    assert helpers.run(command(**changes, **ACCUMULATED, save_dir=tmp_path / "run")) == 0
    small = {**changes, "batch_size": 2, "total_batch_size": 2, "save_dir": tmp_path / "small"}
    assert helpers.run(command(**small)) == 0
    a, b = (helpers.tensors(tmp_path / name / "model_1") for name in ("run", "small"))
    bases = [name for name in a if name.endswith("_basis")]
    assert len(bases) == PROJECTED
    assert max((a[name] - b[name]).abs().max().item() for name in bases) < 1e-9


def test_staggered_refreshes_are_recorded(command, tmp_path):
    assert helpers.run(command(**SMALL, **ACCUMULATED, num_extra_training_steps=6)) == 0
    refreshed = [record.get("refreshed_layers", 0) for record in helpers.records(tmp_path / "run") if "loss" in record]
    assert refreshed == [PROJECTED] + [2] * 14


# Clipping.


@pytest.mark.parametrize("clip_full", [False, True])
def test_each_gradient_is_clipped_by_its_own_norm(clip_full):
    torch.manual_seed(0)
    plain, small, projected = (torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.float64)) for _ in range(3))
    gradients = [torch.randn(12, 8, dtype=torch.float64) * size for size in (3.0, 1e-3, 5.0)]
    groups = [{"params": [plain, small]}, {"params": [projected], "rank": 2, "scale": 0.5}]
    optimizer = LowRankOptimizer(groups, rule="sgd", lr=0.1)
    updates = PerLayerUpdates(optimizer, clip=0.7, clip_full=clip_full)
    updates.begin_update(0)
    updates.begin_micro_batch(0, 1)
    sum((p * g).sum() for p, g in zip((plain, small, projected), gradients, strict=True)).backward()
    assert torch.linalg.vector_norm(plain.detach()) == pytest.approx(0.1 * 0.7, rel=1e-6)
    torch.testing.assert_close(small.detach(), -0.1 * gradients[1])  # it is within the limit
    low = torch.linalg.svdvals(gradients[2])[:2].square().sum().sqrt()
    share = low / torch.linalg.vector_norm(gradients[2]) if clip_full else 1.0
    moved = torch.linalg.vector_norm(projected.detach())
    assert moved == pytest.approx(float(0.1 * 0.5 * 0.7 * share), rel=1e-6)
    norms = [torch.linalg.vector_norm(gradients[0]), torch.linalg.vector_norm(gradients[1]), low]
    assert updates.grad_norm() == pytest.approx(float(torch.stack(norms).square().sum().sqrt()))  # before clipping
    assert all(param.grad is None for param in (plain, small, projected))


def test_the_log_says_how_gradients_are_clipped(command, capsys):
    changes = {**SMALL, "num_training_steps": 2, "per_layer": True, "clip_grad_norm": 0.5}
    assert helpers.run(command(**changes)) == 0
    assert "clipping: each parameter's gradient by its own norm, 0.5" in capsys.readouterr().err


# Updates that do not take place.


GALORE_PER_LAYER = {**QUICK, **GALORE, "update_proj_gap": 3, "per_layer": True, "save_every": 1}


def skipped(folder) -> list[int]:
    return [record["update_step"] for record in helpers.records(folder) if record.get("skipped")]


def test_an_update_that_is_not_finite_is_skipped(command, tmp_path, monkeypatch):
    with poison(monkeypatch, {3}):  # at which all refreshes are due, in its second micro-batch of two
        stop_after(7, command(**GALORE_PER_LAYER, **WHOLE_FIRST_BASES))
    run = tmp_path / "run"
    assert helpers.different_tensors(run / "model_3", run / "model_4") == []
    assert helpers.different_tensors(run / "model_4", run / "model_5") != []
    assert {n: refreshes(run / f"model_{n}") for n in (4, 5, 6, 7)} == {4: {0}, 5: {4}, 6: {4}, 7: {6}}
    assert skipped(run) == [4] and helpers.counters(run / "model_7")["skipped_updates"] == 1


def test_a_single_gradient_that_is_not_finite_stays_behind(command, tmp_path, monkeypatch):
    """Others have moved before it was seen: per-layer updates cannot be taken back."""
    with poison(monkeypatch, {3}, poisoned_gradient):  # of the embeddings alone
        stop_after(4, command(**GALORE_PER_LAYER))
    changed = helpers.different_tensors(tmp_path / "run" / "model_3", tmp_path / "run" / "model_4")
    assert changed and not any("embed_tokens" in name for name in changed)
    assert skipped(tmp_path / "run") == [4]


def test_skip_batches(command, tmp_path):
    stop_after(6, command(**GALORE_PER_LAYER, skip_batches="3,4"))
    run = tmp_path / "run"
    assert helpers.different_tensors(run / "model_3", run / "model_5") == []
    assert helpers.different_tensors(run / "model_5", run / "model_6") != []
    assert skipped(run) == [4, 5] and helpers.counters(run / "model_6")["skipped_updates"] == 0


@pytest.mark.parametrize("precision, dtypes", [("bf16_sr", {torch.float32}), ("bf16", {torch.bfloat16})])
def test_ranks_average_gradients_in_float32_unless_all_is_as_published(precision, dtypes):
    settings = {"method": "galore", "per_layer": True, "rank": 2, "precision": precision, "target_modules": ("mlp",)}
    config = Config.from_settings({**settings, "optimizer": "adamw", "scale": 1.0, "stagger_refresh": False})
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(6, 4, bias=False), "head": torch.nn.Linear(4, 2)}).bfloat16()
    method, seen = load_method("galore")(config), set()
    optimizer = method.build_optimizer(model)

    def reduce(tensor):
        seen.add(tensor.dtype)
        return tensor

    method.prepare(model, optimizer, reduce)
    optimizer.begin_update(0)
    optimizer.begin_micro_batch(0, 1)
    model["head"](model["mlp"](torch.ones(3, 6, dtype=torch.bfloat16))).sum().backward()
    assert dtypes <= seen and (torch.bfloat16 in seen) == (precision == "bf16")
