"""Python code that the documentation shows runs as it stands, on small stand-ins for what it does not define."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import helpers
import pytest
import torch
from test_library_use import tiny_llama
from torch import nn

from peft_pretraining.distributed.sharding import WHOLE
from peft_pretraining.optim import (
    Batches,
    Collective,
    Direction,
    LowRankOptimizer,
    ParamUpdate,
    Phases,
    StateTensor,
    UpdateRule,
    roles_of,
)

ELSEWHERE = {"docs/library.md": "tests/test_library_use.py", "docs/export.md": "tests/test_export.py"}
"""Pages whose blocks other tests execute, or do what they show."""


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (helpers.PROJECT / page).read_text(), re.S | re.M)


def stand_ins() -> dict[str, Any]:
    """Names that the pages use: a model of two matrices and a vector, its data, and the library's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8))
    batches = [torch.randn(4, 12) for _ in range(2)]

    def loss(batch):
        return model(batch).square().mean()

    return {
        **{"model": model, "loss": loss, "steps": 2, "step": 0, "micro_batches": batches, "skipped": False},
        **{"regular": [model[0].bias, model[1].bias], "projected": [model[0].weight, model[1].weight]},
        **{"backward": lambda batch: loss(batch).backward(), "next_batch": lambda: batches[0]},
        **{"LowRankOptimizer": LowRankOptimizer, "UpdateRule": UpdateRule, "Direction": Direction, "WHOLE": WHOLE},
        **{"Collective": Collective, "Batches": Batches, "Sequence": Sequence, "ParamUpdate": ParamUpdate},
        **{"Phases": Phases, "Any": Any, "roles_of": roles_of, "own_rule": "own"},
    }


def test_every_page_with_python_is_here():
    pages = [helpers.PROJECT / "README.md", *(helpers.PROJECT / "docs").rglob("*.md")]
    shown = {str(page.relative_to(helpers.PROJECT)) for page in pages if "\n```python\n" in page.read_text()}
    assert shown == {"README.md", "docs/gradient_projection.md", *ELSEWHERE}


def test_the_readmes_optimizer():
    names = stand_ins()
    (block,) = python_blocks("README.md")
    exec(block, names)
    assert [group["lr"] for group in names["optimizer"].param_groups] == [0.01, 0.01]
    names["loss"](names["micro_batches"][0]).backward()
    names["optimizer"].step()


def test_gradient_projection():
    from_model, groups, per_layer, steps, *rules = python_blocks("docs/gradient_projection.md")
    names = {**stand_ins(), "model": tiny_llama()}
    exec(from_model, names)
    assert any("rank" in group for group in names["optimizer"].param_groups)
    names = stand_ins()
    exec(groups, names)
    before = [param.detach().clone() for param in names["model"].parameters()]
    exec(steps, names)
    assert all(not torch.equal(*pair) for pair in zip(before, names["model"].parameters(), strict=True))
    names = stand_ins()
    exec(groups, names)
    before = names["model"][0].weight.detach().clone()
    exec(per_layer, names)
    assert not torch.equal(before, names["model"][0].weight)
    assert len(rules) == 2


@pytest.mark.parametrize("place", [-2, -1])
def test_rules_of_ones_own(place):
    names = stand_ins()
    exec(python_blocks("docs/gradient_projection.md")[place], names)
    shown = names["RowNorm" if place == -2 else "Momentum"]

    class Rule(shown):  # type: ignore[misc, valid-type]
        def declare_state(self, like, group, shard=WHOLE):
            return {"exp_avg": StateTensor.like_gradient(torch.zeros_like(like), shard)}

    weights = names["projected"]
    optimizer = LowRankOptimizer([{"params": weights, "rule": Rule()}], lr=0.1)
    names["loss"](names["micro_batches"][0]).backward()
    before, grads = [w.detach().clone() for w in weights], [w.grad.clone() for w in weights]
    optimizer.step()
    for old, new, grad in zip(before, weights, grads, strict=True):
        step = grad / grad.norm(dim=1, keepdim=True) if place == -2 else 0.1 * grad
        torch.testing.assert_close(old - new.detach(), 0.1 * step)


def test_groups_by_role():
    (block,) = python_blocks("examples/my_method/README.md")
    names = {**stand_ins(), "model": tiny_llama()}
    exec(block, names)
    assert {group["rule"] for group in names["groups"]} == {"adamw", "own"}
