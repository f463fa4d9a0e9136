"""The update rule against the paper's formulas, number by number."""

import math

import pytest
import torch
from my_method.method import AdEMAMix

from peft_pretraining.optim import LowRankOptimizer

BETA1, BETA2, EPS, LR, DECAY = 0.8, 0.95, 1e-3, 0.1, 0.2


def by_hand(w, gradients, alpha, beta3, warmup):
    """One weight after updates with these gradients: algorithm 1 with plain numbers."""
    m1 = m2 = v = 0.0
    for t, g in enumerate(gradients, start=1):
        a, b = math.log(BETA1), math.log(beta3)
        beta3_t = min(math.exp(a * b / ((1 - t / warmup) * b + t / warmup * a)), beta3) if t < warmup else beta3
        alpha_t = min(t * alpha / warmup, alpha)
        m1 = BETA1 * m1 + (1 - BETA1) * g
        m2 = beta3_t * m2 + (1 - beta3_t) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        m1_hat, v_hat = m1 / (1 - BETA1**t), v / (1 - BETA2**t)
        w = w - LR * ((m1_hat + alpha_t * m2) / (math.sqrt(v_hat) + EPS) + DECAY * w)
    return w


@pytest.mark.parametrize(("alpha", "beta3", "warmup"), [(5.0, 0.999, 4), (2.0, 0.99, 50), (0.0, 0.9, 1)])
def test_updates_are_those_of_the_paper(alpha, beta3, warmup):
    gradients = [1.0, -0.5, 0.25, 2.0, -3.0, 0.125]
    weight = torch.nn.Parameter(torch.tensor([0.7, -1.3], dtype=torch.float64))
    expected = [by_hand(value, gradients, alpha, beta3, warmup) for value in weight.tolist()]
    rule = AdEMAMix(alpha, beta3, warmup)
    optimizer = LowRankOptimizer([weight], rule=rule, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    assert weight.tolist() == pytest.approx(expected, rel=1e-12)


def test_without_the_slow_moment_it_is_adamw():
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2))
    settings = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
    optimizers = [
        LowRankOptimizer([ours], rule=AdEMAMix(0.0, 0.99, 10), **settings),
        torch.optim.AdamW([theirs], **settings),
    ]
    for update in range(5):
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = torch.arange(6.0, dtype=torch.float64).view(3, 2) - update
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)
