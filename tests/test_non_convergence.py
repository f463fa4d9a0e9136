"""The non-convergence experiment: its problem, and what the methods do on a short run."""

from __future__ import annotations

import math
import sys
from functools import cache

import helpers
import pytest
import torch

sys.path.insert(0, str(helpers.PROJECT / "experiments"))

import descent
import non_convergence_config as config
import non_convergence_report as report
from quadratic import Quadratic, noise_signs

from peft_pretraining import rng

SHORT = "--lr 2e-3 --steps 3000 --T 50"
"""lr x steps as in the full experiment: the same way in longer steps."""


def only_run(command: str) -> config.Run:
    (run,) = config.load(command.split(), description="")[0].runs()
    return run


@cache
def short_run(optimizer: str, method: str) -> descent.Trajectory:
    return descent.descend(only_run(f"{SHORT} --optimizer {optimizer} --type {method}"))


# The problem


@pytest.fixture(params=[(10, 4, 1.0), (7, 2, 0.5)], ids=str)
def problem(request):
    n, rank, sigma = request.param
    return Quadratic(n, rank, sigma, seed=42)


def test_gradient_is_autograd_of_the_definition(problem):
    x = problem.start.clone().requires_grad_()
    ((problem.a @ x).square().sum() / 2 + (problem.b * x).sum()).backward()
    torch.testing.assert_close(problem.gradient(x.detach()), x.grad)


def test_minimum_is_reached_at_minus_b_and_nowhere_undercut(problem):
    assert problem.objective(-problem.b) == pytest.approx(problem.minimum, rel=1e-12)
    assert problem.gradient(-problem.b).abs().max() == 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        away = torch.randn(problem.b.shape, generator=generator)
        expected = problem.minimum + (problem.a @ away).double().square().sum().item() / 2
        assert problem.objective(away - problem.b) == pytest.approx(expected, rel=1e-5)


def test_construction_of_the_paper():
    problem = Quadratic(10, 4, 1.0, seed=42)
    assert problem.minimum == pytest.approx(-23.217, abs=5e-4)  # what independent trials have for this seed
    kept = torch.zeros(10, 10)
    kept[:6, :6] = 1
    assert torch.equal(problem.b != 0, kept.bool())
    assert torch.equal(problem.c.diagonal(), torch.tensor([0.0] * 6 + [1.0] * 4)) and problem.c.sum() == 4
    assert torch.equal(problem.start[:6], torch.eye(10)[:6] / 2)
    assert (problem.start[6:] != 0).all()
    # f does not see the rows of the noise, so nothing stops the full gradient from converging.
    assert problem.gradient(problem.start)[6:].abs().max() == 0


def test_stochastic_gradient_has_the_gradient_for_a_mean(problem):
    x = torch.randn(problem.b.shape, generator=torch.Generator().manual_seed(1))
    plus, minus = (problem.stochastic_gradient(x, sign) for sign in (1, -1))
    torch.testing.assert_close((plus + minus) / 2, problem.gradient(x))
    torch.testing.assert_close(plus - minus, 2 * problem.c)


def test_noise_is_fair_and_a_function_of_seed_and_step():
    signs = list(noise_signs(42, 25_000))
    assert set(signs) == {-1, 1} and len(signs) == 25_000
    assert abs(sum(signs)) < 5 * math.sqrt(25_000)
    assert list(noise_signs(42, 12_345)) == signs[:12_345]
    assert signs[:1000] != signs[10_000:11_000] and list(noise_signs(1, 1000)) != signs[:1000]


# The methods


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_galore_stalls_and_the_others_fall(optimizer):
    gap = {method: short_run(optimizer, method).samples[-1].gap for method in config.METHODS}
    assert gap["galore"] > 1.5
    assert gap["golore"] < 0.15
    assert gap["full"] < 0.01
    assert gap["large_batch"] < 0.02
    for method in config.METHODS:
        samples = short_run(optimizer, method).samples
        assert report.trend([(sample.step, sample.gap) for sample in samples]) == report.CLAIM[method]


def test_sgd_with_the_full_gradient_follows_the_closed_form():
    """Each step takes the share lr off A X - A X*: the gap is that of the start times (1 - lr)^(2 steps)."""
    samples = short_run("sgd", "full").samples
    for sample in samples[:200]:
        assert sample.gap == pytest.approx(samples[0].gap * (1 - 2e-3) ** (2 * sample.step), rel=1e-4)


def test_golore_is_galore_until_it_turns_random():
    galore, golore = (short_run("sgd", method).samples for method in ("galore", "golore"))
    same = [a == b for a, b in zip(galore, golore, strict=True)]
    turn = next(i for i, sample in enumerate(galore) if sample.step > 3000 * config.RAND_RATIO["sgd"])
    assert all(same[:turn]) and not any(same[turn:])


def test_large_batch_shows_the_svd_its_mean_and_the_update_a_single_draw(monkeypatch):
    run = only_run("--type 3 --optimizer SGD --steps 150 --grad_accumulation 8")
    seen, used = [], []
    original = descent.build_optimizer

    def build(run, x):
        optimizer = original(run, x)
        (subspace,) = optimizer.subspaces.values()
        compute_bases, step = subspace.rule.compute_bases, optimizer.step

        def seeing(refreshes):
            seen.extend(refresh.grad.clone() for refresh in refreshes)
            return compute_bases(refreshes)

        subspace.rule.compute_bases = seeing
        optimizer.step = lambda: (used.append(x.grad.clone()), step())
        return optimizer

    monkeypatch.setattr(descent, "build_optimizer", build)
    descent.descend(run)
    assert len(seen) == 2 and len(used) == 150  # refreshes at steps 0 and 100
    signs = list(noise_signs(run.seed, run.steps))
    assert [round(grad[9, 9].item()) for grad in used] == signs
    for grad, step in zip(seen, (0, 100), strict=True):
        others = 2 * torch.randint(2, (7,), generator=rng.generator(run.seed, "large batch", step)) - 1
        assert grad[9, 9].item() == pytest.approx((others.sum().item() + signs[step]) / 8)


def test_runs_repeat_bit_by_bit_and_divergence_is_named():
    run = only_run("--type golore --optimizer AdamW --steps 400 --rand_ratio 0.5")
    assert descent.descend(run).samples == descent.descend(run).samples
    wild = only_run("--type full --optimizer SGD --steps 400 --lr 10")
    assert report.trend([(sample.step, sample.gap) for sample in descent.descend(wild).samples]) == "diverges"
