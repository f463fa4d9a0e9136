"""Small bfloat16 parameters of every shape, optimizers of them in every format, and gradients that bfloat16 has."""

import pytest
import torch
from torch import nn

from peft_pretraining.optim import LowRankOptimizer

NAMES = ("tall", "wide", "vector", "scalar")
SHAPES = ((6, 4), (4, 7), (5,), ())
RULES = {
    "adamw": {"rule": "adamw", "lr": 0.05},
    "torch_adamw": {"rule": "torch_adamw", "lr": 0.05},
    "adafactor": {"rule": "adafactor", "beta1": 0.9, "lr": 0.05},
    "lion": {"rule": "lion", "betas": (0.9, 0.95), "lr": 0.01},
    "sgd": {"rule": "sgd", "momentum": 0.9, "lr": 0.1},
}
BASES = {
    "no basis": {},
    "SVD": {"rank": 3, "update_proj_gap": 3},
    "both sides": {"rank": 3, "update_proj_gap": 3, "proj_type": "full"},
    "online": {"rank": 3, "proj_type": "continuous"},
}
KINDS = [(rule, basis) for rule in RULES for basis in BASES if rule != "torch_adamw" or basis == "no basis"]
every_kind = pytest.mark.parametrize("rule, basis", KINDS)
HALF = torch.bfloat16


def weights(dtype=HALF):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(HALF).to(dtype)) for shape in SHAPES]


def optimizer_of(params, rule, basis, **changes):
    named = list(zip(NAMES, params, strict=True))
    groups = [{"params": named[:2], **BASES[basis], **changes}, {"params": named[2:], **changes}]
    return LowRankOptimizer(groups, weight_decay=0.1, **RULES[rule])


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(HALF).to(param.dtype)


def train(optimizer, params, first, last):
    for step in range(first, last):
        set_gradients(params, step)
        optimizer.step()


def bits(params):
    return [param.detach().view(torch.int16).tolist() for param in params]
