"""Every update rule with and without each kind of basis, on a problem small enough for all of them."""

import io

import pytest
import torch
from torch import nn

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.vector_adamw import VectorAdamW

RULES = {
    "adamw": {"rule": "adamw", "lr": 0.05},
    "adamw8bit": {"rule": "adamw8bit", "lr": 0.05},
    "adafactor": {"rule": "adafactor", "lr": 0.05},
    "adafactor with beta1": {"rule": "adafactor", "beta1": 0.9, "lr": 0.05},
    "lion": {"rule": "lion", "lr": 0.01},
    "sgd": {"rule": "sgd", "lr": 0.1},
    "sgd with momentum": {"rule": "sgd", "momentum": 0.9, "dampening": 0.9, "lr": 0.1},
}
BASES = {
    "no basis": {"rank": None},
    "SVD": {"rank": 3, "update_proj_gap": 4},
    "random": {"rank": 3, "update_proj_gap": 4, "rand_ratio": 0.0},
    "online": {"rank": 3, "update_proj_gap": 4, "proj_type": "continuous"},
}
SHAPES = ((6, 4), (4, 7), (5,), ())
"""Of the parameters; the first two are projected."""


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


class Kind:
    """One combination, and how to make its optimizer."""

    def __init__(self, rule, basis):
        self.rule, self.basis = rule, basis

    def __call__(self, params, **changes):
        if self.rule == "vector":
            groups = [{"params": params[:1], "vectors": 0}, {"params": params[1:2], "vectors": 1}]
            return VectorAdamW([*groups, {"params": params[2:]}], **{"lr": 0.05, **changes})
        groups = [{"params": params[:2], **BASES[self.basis]}, {"params": params[2:]}]
        return LowRankOptimizer(groups, **{**RULES[self.rule], **changes})


KINDS = [pytest.param(Kind(rule, basis), id=f"{rule}, {basis}") for rule in RULES for basis in BASES]
KINDS.append(pytest.param(Kind("vector", None), id="vector adamw"))
every_kind = pytest.mark.parametrize("kind", KINDS)


def loss_of(params):
    """Convex, with its minimum at 1 and curvatures from 0.1 to 1."""
    return sum(((param - 1).square() * torch.linspace(0.1, 1, max(param.numel(), 1)).view(param.shape)).sum()
               for param in params)  # fmt: skip


def backward(params, step=None):
    """Gradients of the loss, or with a number of an update ones that are the same wherever the weights are."""
    for index, param in enumerate(params):
        param.grad = None
        if step is not None:
            generator = torch.Generator().manual_seed(100 * step + index)
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
    if step is None:
        loss_of(params).backward()


def train(optimizer, params, first, last):
    for step in range(first, last):
        backward(params, step)
        optimizer.step()
        optimizer.zero_grad()


def values(params):
    return [param.detach().clone() for param in params]


def assert_equal(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)
