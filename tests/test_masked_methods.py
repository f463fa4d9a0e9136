"""Methods with rules and lifts of their own: masked, or computed for many matrices together, they are the same."""

from functools import partial

import pytest
import torch
from test_masked_updates import Loop, pattern, state_of
from torch import nn

from peft_pretraining import optim
from peft_pretraining.optim.tensors import launching

SHAPES = ((6, 4), (6, 4), (4, 7), (5, 5), (6, 4), (4, 7), (5,))
PROJECTED = {"rank": 3, "update_proj_gap": 4}
KINDS = {
    "apollo": partial(optim.Apollo, **PROJECTED),
    "apollo_mini": partial(optim.ApolloMini, update_proj_gap=4),
    "fira": partial(optim.Fira, **PROJECTED),
    "fira, orthogonal": partial(optim.Fira, residual="orthogonal", **PROJECTED),
    "alice": partial(optim.Alice, leading=1, **PROJECTED),
    "alice_0": partial(optim.Alice, leading=1, beta3=0.0, **PROJECTED),
    "ldadam": partial(optim.LDAdam, rank=3),
    "ldadam, no feedback": partial(optim.LDAdam, rank=3, error_feedback=False),
}


def loop(kind, masked=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    return Loop(KINDS[kind](params, lr=0.02, weight_decay=0.1), params, masked)


def assert_close(one, other, tolerance=1e-9):
    """Weights and states; counters to the number."""
    for first, second in zip(one.params, other.params, strict=True):
        torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
    states = [state_of(each.optimizer) for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(
            value, states[1][key], rtol=tolerance, atol=tolerance, msg=lambda text, k=key: f"{k} {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_update_is_the_one_that_the_host_decides_on(kind):
    loops = [loop(kind, masked) for masked in (False, True)]
    assert all(loops[1].optimizer.objects(param).masks for param in loops[1].params)
    for each in loops:
        each.optimizer.scale_ = lambda factor: None  # a clip by NaN would spoil the gradients of all matrices
    for step, broken in enumerate(pattern(0, 12)):
        for each in loops:
            each.update(step, broken)
        loops[1].settle()
        assert_close(*loops)
    assert any(pattern(0, 12)) and not all(pattern(0, 12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_devices_compute_together_is_what_the_cpu_computes_one_by_one(monkeypatch, kind, dtype):
    loops = []
    for together in (False, True):
        monkeypatch.setattr(launching, "ON_EVERY_DEVICE", together)
        loops.append(loop(kind, dtype=dtype))
        for step in range(6):
            loops[-1].update(step, broken=None)
    # A bfloat16 weight that lies between two of its numbers may be rounded to either, and gradients are not the same.
    assert_close(*loops, tolerance=1e-9 if dtype == torch.float64 else 0.02)
