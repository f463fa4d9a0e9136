"""One run of the non-convergence experiment: an inner optimizer and a projection on a `Quadratic`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from non_convergence_config import Run
from quadratic import Quadratic, draw_signs, noise_signs
from torch import nn

from peft_pretraining import rng
from peft_pretraining.optim import LowRankOptimizer


@dataclass(frozen=True)
class Sample:
    """The iterate after so many steps."""

    step: int
    objective: float
    """f(X)."""
    gap: float
    """f(X) - f*."""


@dataclass(frozen=True)
class Trajectory:
    run: Run
    minimum: float
    """f*."""
    samples: tuple[Sample, ...]
    """In the order of their steps, the start and the end among them."""
    seconds: float


def descend(run: Run) -> Trajectory:
    """Follow one method for `run.steps` steps. The same numbers every time, whatever else is run beside it."""
    began = time.perf_counter()
    problem = Quadratic(run.n, run.rank, run.sigma, run.seed)
    x = nn.Parameter(problem.start.clone())
    optimizer = build_optimizer(run, x)

    def sample(step: int) -> Sample:
        value = problem.objective(x.detach())
        return Sample(step, value, value - problem.minimum)

    samples = [sample(0)]
    for step, sign in enumerate(noise_signs(run.seed, run.steps)):
        optimizer.begin_update(step)
        if run.svd_draws > 1 and optimizer.some_refresh_reads_gradients():
            _observe_batch(run, problem, x, optimizer, step)
        x.grad = problem.stochastic_gradient(x.detach(), sign)
        optimizer.step()
        if (step + 1) % run.sample_every == 0 or step + 1 == run.steps:
            samples.append(sample(step + 1))
    return Trajectory(run, problem.minimum, tuple(samples), time.perf_counter() - began)


def build_optimizer(run: Run, x: nn.Parameter) -> LowRankOptimizer:
    """The training runs' own optimizer: exact SVD, scale 1, no momentum (SGD), no weight decay."""
    group = {"params": [("X", x)]}  # without a rank: the identity for a projection
    if run.projected:
        group |= {"rank": run.rank, "proj_type": "left", "update_proj_gap": run.update_proj_gap, "scale": 1.0}
    if run.rand_ratio is not None:
        group |= {"rand_ratio": run.rand_ratio, "num_training_steps": run.steps}
    return LowRankOptimizer([group], rule=run.optimizer, lr=run.lr, svd_method="exact", seed=run.seed)


def _observe_batch(run: Run, problem: Quadratic, x: nn.Parameter, optimizer: LowRankOptimizer, step: int) -> None:
    """Show the coming SVD further draws of the noise at the same X; the step's own draw is the last of the batch."""
    gradients = {sign: problem.stochastic_gradient(x.detach(), sign) for sign in (-1, 1)}
    for sign in draw_signs(run.svd_draws - 1, rng.generator(run.seed, "large batch", step)):
        x.grad = gradients[sign]
        optimizer.observe_gradients()
