"""The stochastic quadratic problem on which GaLore with SVD bases does not converge (arXiv 2410.11289, section 4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_pretraining import rng

_SIGNS_PER_BLOCK = 10_000


class Quadratic:
    """f(X) = ½‖A X‖² + ⟨B, X⟩ over X (n, n), whose gradient is seen as ∇f + ξ·C with ξ = ±1 at equal chance.

    A = [I 0] is (n - r, n). B (n, n) is N(0, σ²) in its top-left block of n - r, and zero elsewhere. C (n, n) is σ on
    the last r places of the diagonal. So the noise has rank r, and lives in rows and columns that f does not see: once
    the r largest singular values of a stochastic gradient are those of the noise, its r leading singular vectors say
    nothing about ∇f. Everything is in float32.
    """

    def __init__(self, n: int, rank: int, sigma: float, seed: int):
        # A plain generator: the usual draw of B for a seed, so that others' values of f* can be compared.
        generator = torch.Generator().manual_seed(seed)
        kept = n - rank
        self.a = torch.eye(n)[:kept]  # (n - r, n)
        self.b = torch.zeros(n, n)
        self.b[:kept, :kept] = sigma * torch.randn(kept, kept, generator=generator)
        self.c = torch.diag(torch.tensor([0.0] * kept + [sigma] * rank))
        self.start = torch.zeros(n, n)  # X at step 0
        self.start[:kept, :kept] = sigma / 2 * torch.eye(kept)
        self.start[kept:] = sigma * torch.randn(rank, n, generator=generator)
        self.minimum = -0.5 * self.b.double().square().sum().item()
        """f*, reached wherever A X is minus the top rows of B."""
        self._hessian = self.a.T @ self.a  # zeros and ones: exact

    def objective(self, x: Tensor) -> float:
        """f(X), in float64: near the minimum the difference to f* is far below float32's spacing at f*."""
        x = x.double()
        return (0.5 * (self.a.double() @ x).square().sum() + (self.b.double() * x).sum()).item()

    def gradient(self, x: Tensor) -> Tensor:
        """∇f = AᵀA X + B."""
        return torch.addmm(self.b, self._hessian, x)  # (n, n) @ (n, n) -> (n, n)

    def stochastic_gradient(self, x: Tensor, sign: int) -> Tensor:
        """∇f + ξ·C for a draw ξ = `sign`."""
        return self.gradient(x).add_(self.c, alpha=sign)


def noise_signs(seed: int, steps: int) -> Iterator[int]:
    """ξ of every step, +1 or -1: a function of the seed and the step, the same for every method."""
    for block, first in enumerate(range(0, steps, _SIGNS_PER_BLOCK)):
        yield from draw_signs(min(_SIGNS_PER_BLOCK, steps - first), rng.generator(seed, "noise", block))


def draw_signs(count: int, generator: torch.Generator) -> list[int]:
    return (2 * torch.randint(2, (count,), generator=generator) - 1).tolist()
