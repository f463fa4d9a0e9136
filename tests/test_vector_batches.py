"""`VectorAdamW` where matrices of one shape are updated together, and nobody reads whether an update takes place."""

import pytest
import torch
from torch import nn

from peft_pretraining.optim.tensors.rounding import Noise, round_stack_, round_stochastically
from peft_pretraining.optim.vector_adamw import VectorAdamW
from peft_pretraining.optim.vector_adamw8bit import VectorAdamW8bit

SHAPES = {"rows": (12, 400), "columns": (400, 12)}
GROUPS = {"rows": 0, "columns": 1, "whole": None}


def optimizer_of(kind, dtype, together, **settings):
    """Some matrices of equal shapes, with counts that differ, and whatever has one count."""
    torch.manual_seed(0)
    shapes = {name: [shape] * 3 for name, shape in SHAPES.items()} | {"whole": [(7,), (7,), (9, 5), (80, 60)]}
    params = {name: [nn.Parameter(torch.randn(s).to(dtype)) for s in of] for name, of in shapes.items()}
    groups = [{"params": params[name], "vectors": vectors, **settings} for name, vectors in GROUPS.items()]
    optimizer = kind(groups, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    optimizer._batched = lambda present: together
    return optimizer, [param for each in params.values() for param in each]


def train(optimizer, params, updates, skipped=(), masks=True):
    """Gradients of skipped updates are not finite."""
    torch.manual_seed(1)
    for step in range(updates):
        for param in params:
            param.grad = torch.randn(param.shape).to(param.dtype)
            if step in skipped:
                param.grad[(0,) * param.ndim] = (torch.nan, torch.inf)[step % 2]
        optimizer.update_step = step
        if step == 3:
            for param in params[:6:2]:
                optimizer.reset_vectors(param, torch.tensor([1, 5]))
        if masks:
            optimizer.found_inf = torch.tensor(float(step in skipped))
        if masks or step not in skipped:
            optimizer.step()


def everything(optimizer, params):
    return [*params, *(value for param in params for _, value in sorted(optimizer.state[param].items()))]


FORMS = {
    "float64": (VectorAdamW, torch.float64, {}),
    "bfloat16": (VectorAdamW, torch.bfloat16, {}),
    "wide": (VectorAdamW, torch.bfloat16, {"state_format": "weight", "rounding": "stochastic"}),
    "8 bits": (VectorAdamW8bit, torch.float32, {}),
    "8 bits, rounded": (VectorAdamW8bit, torch.bfloat16, {"rounding": "stochastic"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_together_is_one_after_the_other(form):
    kind, dtype, settings = FORMS[form]
    results = []
    for together in (False, True):
        optimizer, params = optimizer_of(kind, dtype, together, **settings)
        train(optimizer, params, 6)
        results.append(everything(optimizer, params))
    # torch's kernel, for those with one count, rounds bfloat16 once an update instead of after each operation.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
    for one, other in zip(*results, strict=True):
        if one.dtype == torch.uint8:  # a code may fall to the other side
            assert (one != other).float().mean() < 1e-3
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_a_masked_update_leaves_no_trace(form):
    kind, dtype, settings = FORMS[form]
    results = []
    for masks in (True, False):
        optimizer, params = optimizer_of(kind, dtype, True, **settings)
        train(optimizer, params, 6, skipped=(0, 3, 4), masks=masks)
        results.append(everything(optimizer, params))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(value.float().isfinite().all() for value in results[0])


@pytest.mark.parametrize("together", [False, True])
def test_gradients_are_divided_by_the_scale(together):
    results = []
    for scale in (1.0, 1024.0):
        optimizer, params = optimizer_of(VectorAdamW, torch.float64, together)
        for param in params:
            param.grad = scale * torch.ones_like(param)
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        results.append(everything(optimizer, params))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_stack_is_rounded_as_its_weights():
    torch.manual_seed(0)
    wide = torch.randn(3, 20, 30)
    noises = [Noise(1, f"layer {index}", 5) for index in range(3)]
    expected = torch.empty(3, 20, 30, dtype=torch.bfloat16)
    for target, each, noise in zip(expected, wide, noises, strict=True):
        round_stochastically(target, each.clone(), noise)
    assert torch.equal(round_stack_(wide.clone(), noises, slice(0, 20)).bfloat16(), expected)
