"""Matrices that one of several devices works on for all: the others get what one process would have found."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import helpers
import pytest
import torch
from conftest import write_blocks, write_model
from launching import launch
from safetensors.torch import load_file
from test_masked_updates import Loop, assert_same, pattern
from torch import nn

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.distributed.team import Team, deal_out
from peft_pretraining.methods.muon.method import MuonRule
from peft_pretraining.methods.soap.method import SoapRule
from peft_pretraining.optim import SOAP, Muon, NorMuon, ParamUpdate
from peft_pretraining.optim.tensors.collectives import run

DEVICES = 3
SHAPES = ((5, 4), (4, 7), (6, 6), (2, 8), (9, 3))
"""Uneven, and with fewer rows than there are devices."""


class Exchange:
    """What threads, as devices, hand to each other."""

    def __init__(self):
        self.barrier = threading.Barrier(DEVICES)
        self.given: dict = {}
        self.calls: list[str] = []

    def all(self, place, value):
        self.given[place] = value
        self.barrier.wait(timeout=60)
        found = [self.given[each] for each in range(DEVICES)]
        self.barrier.wait(timeout=60)
        return found


@dataclass(frozen=True)
class Threads(Team):
    def exchange(self, parts, sizes):
        found = [given[self.place] for given in self._all("exchange", [part.clone() for part in parts])]
        assert [part.numel() for part in found] == list(sizes)
        return found

    def gather(self, part, sizes):
        found = self._all("gather", part.clone())
        assert [part.numel() for part in found] == list(sizes)
        return found

    def add_up(self, part):
        return part.copy_(sum(self._all("sum", part.clone())))

    def _all(self, name, value):
        if self.place == 0:
            self.group.calls.append(name)
        return self.group.all(self.place, value)


def shard_of(shape, dim, team):
    """A device's part, as torch divides it."""
    if team is None or dim is None:
        return ShardInfo(torch.Size(shape), **({} if team is None else {"team": team}))
    whole = ShardInfo(torch.Size(shape), dim, 0, 0, dim, team.add_up, team=team)
    return ShardInfo(torch.Size(shape), dim, *whole.part_of(team.place), dim, team.add_up, team=team)


def directions(rule, dims, team=None):
    """D of each matrix in three updates, this device's part; and the state after them."""
    group, owners = {"betas": (0.9, 0.95), "eps": 1e-8}, deal_out([min(s) ** 2 * max(s) for s in SHAPES], DEVICES)
    shards = [shard_of(shape, dim, team) for shape, dim in zip(SHAPES, dims, strict=True)]
    states, found = [], []
    for shape, shard in zip(SHAPES, shards, strict=True):
        like = shard.part(torch.zeros(shape, dtype=torch.float64), shard.dim or 0)
        states.append({key: each.value for key, each in rule.declare_state(like, group, shard).items()})
    for k in range(1, 4):
        generator = torch.Generator().manual_seed(k)
        updates = []
        for index, (shape, shard) in enumerate(zip(SHAPES, shards, strict=True)):
            grad = torch.randn(shape, generator=generator, dtype=torch.float64)
            part = shard.part(grad, shard.dim or 0).contiguous()
            owner = owners[index] if team else 0
            updates.append(
                ParamUpdate(
                    "", index, part, part, states[index], k - 1, 1.0, low_rank_shard=shard, owner=owner, count=k
                )
            )
        found.append([each and (each.tensor * each.factor) for each in run(rule.directions(updates, group))])
    return found, states, shards


RULES = {
    "muon": lambda: MuonRule(),
    "muon, spectral, without nesterov": lambda: MuonRule(nesterov=False, scale="spectral"),
    "normuon": lambda: MuonRule(neuron_beta2=0.9),
    "soap": lambda: SoapRule(gap=2, shares_work=True),
    "soap, one side": lambda: SoapRule(gap=1, max_side=5, shares_work=True),
}


@pytest.mark.parametrize("dims", [(0,) * 5, (1,) * 5, (None,) * 5, (0, 1, None, 1, 0)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_devices_find_what_one_finds(name, dims):
    expected, states, _ = directions(RULES[name](), (None,) * 5)
    exchange = Exchange()
    with ThreadPoolExecutor(DEVICES) as pool:
        teams = [Threads(DEVICES, place, exchange) for place in range(DEVICES)]
        results = list(pool.map(lambda team: directions(RULES[name](), dims, team), teams))
    for found, own, shards in results:
        for ours, theirs in zip(found, expected, strict=True):
            for part, whole, shard in zip(ours, theirs, shards, strict=True):
                assert (part is None) == (whole is None)
                if whole is not None:
                    torch.testing.assert_close(part, shard.part(whole, shard.dim or 0), rtol=1e-9, atol=1e-9)
        for ours, theirs, shard in zip(own, states, shards, strict=True):
            for key, whole in theirs.items():
                its = shard if whole.ndim == 2 and key.startswith("exp") else shard.of_shape(whole.shape)
                if key == "row_mean_sq" and shard.dim != 0:
                    its = ShardInfo(whole.shape)  # every device has all columns' means
                if not key.startswith("vectors"):  # their signs are anything
                    torch.testing.assert_close(ours[key], its.part(whole, its.dim or 0), rtol=1e-9, atol=1e-9)
    assert len(exchange.calls) <= 3 * 5, exchange.calls


def test_owners_have_about_as_much_to_do():
    costs = [1.0] * 32 + [2.7] * 24 + [30.0]
    for size in (2, 4, 7):
        loads = [0.0] * size
        for cost, owner in zip(costs, deal_out(costs, size), strict=True):
            loads[owner] += cost
        assert max(loads) <= max(30.0, sum(costs) / size + 2.7)
    assert deal_out([3.0, 1.0], 2, [5.0, 0.0]) == [1, 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make", [Muon, NorMuon, lambda params, **settings: SOAP(params, gap=3, **settings)], ids=["muon", "normuon", "soap"]
)
def test_a_masked_update_is_the_one_that_the_host_decides_on(make, seed):
    loops = []
    for masked in (False, True):
        generator = torch.Generator().manual_seed(0)
        shapes = ((6, 4), (6, 4), (4, 7), (5,))
        params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
        loops.append(Loop(make(params, lr=0.05), params, masked))
    for step, broken in enumerate(pattern(seed, 12)):
        for loop in loops:
            loop.update(step, broken)
        loops[1].settle()
        assert_same(*loops, exact=False)


# Processes.

METHODS = {
    "muon": {"method": "muon"},
    "normuon": {"method": "normuon"},
    "soap": {"method": "soap", "update_proj_gap": 2},
    "muon, head": {"method": "muon", "head_optimizer": "method"},
}
FSDP = {"distributed_type": "fsdp"}
LAYOUTS = {
    "fsdp 4": (4, FSDP, METHODS),
    "hsdp 2x2": (4, {**FSDP, "replicas": 2}, METHODS),
    "ddp 2": (2, {"muon_shard_compute": True}, ["muon", "normuon", "muon, head"]),
    "ddp 2, per layer": (2, {"muon_shard_compute": True, "per_layer": True, "clip_grad_norm": 0}, ["muon", "normuon"]),
}


def command(folder, name, **changes):
    settings = {
        **{"model_config": folder / "llama.json", "dataset_path": folder / "data", "save_dir": folder / name},
        **{"total_batch_size": 8, "lr": 3e-3, "num_training_steps": 6, "warmup_steps": 1, "workers": 0},
        **{"eval_every": 6, "save_every": 6, "dtype": "float64", **changes},
    }
    return [str(part) for flag, value in settings.items() for part in (f"--{flag}", value)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_are_one(tmp_path, layout):
    processes, flags, names = LAYOUTS[layout]
    write_blocks(tmp_path / "data")
    write_model(tmp_path / "llama.json", hidden_size=32, intermediate_size=45)
    cases = [{"argv": command(tmp_path, f"many {name}", batch_size=2, **METHODS[name], **flags)} for name in names]
    launch(tmp_path / "launch", processes, cases)
    clip = {"clip_grad_norm": 0} if "per_layer" in flags else {}
    reports = [json.loads((tmp_path / "launch" / f"rank{rank}.json").read_text()) for rank in range(processes)]
    for place, name in enumerate(names):
        assert helpers.run(command(tmp_path, f"one {name}", batch_size=8, **METHODS[name], **clip)) == 0
        ours, expected = (
            load_file(tmp_path / f"{count} {name}" / "model_6" / "model.safetensors") for count in ("many", "one")
        )
        for key in expected:
            torch.testing.assert_close(
                ours[key], expected[key], rtol=0, atol=1e-9, msg=lambda text, key=key: key + text
            )
        for digest in ("digest", "state_digest"):
            assert len({report[place][digest] for report in reports}) == 1


def test_one_process_has_nobody_to_share_with(tmp_path, capfd):
    write_blocks(tmp_path / "data")
    write_model(tmp_path / "llama.json")
    assert helpers.run(command(tmp_path, "run", batch_size=8, method="muon", muon_shard_compute=True)) == 0
    assert "--muon_shard_compute has no effect on one process" in "".join(capfd.readouterr())
