"""Tiny runs with rates and decays of their own for embedding, head and norms, and what one update should come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
from conformance.runs import (
    BASE,
    CASES,
    Case,
)
from torch import Tensor

from peft_pretraining.checkpoint.checkpointer import Checkpointer
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.model_groups import roles_of
from peft_pretraining.training import build

RATE = BASE["lr"]
OWN = {
    **{"head_lr": 0.003, "embed_lr": 0.02, "norm_lr": 0.005},
    **{"head_weight_decay": 0.1, "embed_weight_decay": 0.2, "norm_weight_decay": 0.3},
}
EXPECTED = {"head": (0.003, 0.1), "embedding": (0.02, 0.2), "norms": (0.005, 0.3)}
"""Role -> the rate and decay that `OWN` gives it."""
ONE_UPDATE = {"num_training_steps": 1, "warmup_steps": 0, "eval_every": 10}
EACH_METHOD = [case for case in CASES if case.is_first]
each_method = pytest.mark.parametrize("case", EACH_METHOD, ids=str)


def quick(*methods: str, cases: Sequence[Case] = EACH_METHOD):
    """Runs a test for every case; all but the first of these methods wait for the slow tier."""
    marks = {case: [] if case.is_first and case.method in methods else [pytest.mark.slow] for case in cases}
    return pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=marks[case]) for case in cases])


one_of_each_kind = quick("full_rank", "galore", "switchlora")


@dataclass
class Trained:
    """A run in this process, of which nothing is saved."""

    run: Any
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @property
    def roles(self) -> dict[str, str]:
        """Of the trained weights."""
        targets = getattr(self.run.config.method, "target_modules", ("self_attn", "mlp"))
        matrices = {name for name, value in self.after.items() if value.ndim > 1 and any(t in name for t in targets)}
        matrices = {name for name in matrices if "lora_" not in name}
        return {name: role for name, role in roles_of(self.run.model, matrices).items() if name in self.after}

    def group_of(self, name: str) -> dict[str, Any]:
        param = self.run.model.get_parameter(name)
        (group,) = [group for group in self.run.optimizer.param_groups if any(p is param for p in group["params"])]
        return group


def train(argv: list[str]) -> Trained:
    """A run by a command line, in this process."""
    original, found = build.train, []

    def observed(run: Any) -> int:
        before = weights(run.model)
        code = original(run)
        found.append(Trained(run, before, weights(run.model)))
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save_last", lambda *_: None)
        patch.setattr(build, "train", observed)
        assert helpers.run(argv) == 0
    return found[0]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def decays_first(trained: Trained, name: str) -> bool:
    """Whether a weight decays before the update, or, as GaLore's do, after it."""
    optimizer = trained.run.optimizer
    if not isinstance(optimizer, LowRankOptimizer):
        return True
    return optimizer.objects(trained.run.model.get_parameter(name)).rule.decays_first


def assert_moved(ours: Trained, plain: Trained, expected: dict[str, tuple[float, float]]) -> None:
    """One update of each role in `expected` is `plain`'s, without decay, at its rate and decay; all else is `plain`'s
    to the bit."""
    seen = set()
    for name, role in ours.roles.items():
        if role not in expected:
            assert torch.equal(ours.after[name], plain.after[name]), name
            continue
        rate, decay = expected[role]
        start, moved = plain.before[name], plain.after[name] - plain.before[name]
        kept, moved = 1 - rate * decay, moved * (rate / plain.group_of(name)["initial_lr"])
        wanted = start * kept + moved if decays_first(plain, name) else (start + moved) * kept
        torch.testing.assert_close(ours.after[name], wanted, rtol=0, atol=1e-14, msg=lambda text, n=name: n + text)
        assert moved.abs().max() > 1e-5, name
        seen.add(role)
    assert seen == expected.keys()
