"""The leading singular vectors of a gradient, by three methods behind one interface, and uniformly random bases.

* `exact`: a full SVD (LAPACK, cuSOLVER), in float32 for float32 and bf16 gradients.
* `gram`: eigenvectors of the Gram matrix of the shorter side. Squaring halves the digits, so it is formed in float64:
  in float32 directions with singular values below 1e-4 of the largest would be noise.
* `randomized`: subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) started from the basis
  in use, or from a Gaussian sketch, and rotated to singular vectors at the end (Rayleigh-Ritz).

Every routine gets finite input, works in float32 or float64, and falls back to the CPU in float64 when the device's
routine does not converge. What fails there, too, raises `torch.linalg.LinAlgError`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peft_pretraining.optim.projection import LEFT, RIGHT, Bases

SVD_METHODS = ("exact", "gram", "randomized")

_OVERSAMPLING = 8
"""Columns of the randomised method beyond the rank; Halko et al. recommend 5 to 10."""


def top_singular_vectors(
    matrix: Tensor, rank: int, sides: tuple[str, ...], method: str, start: Bases, generator: torch.Generator
) -> Bases:
    """The first `rank` left singular vectors (m, r), right ones (r, n), or both, as `sides` asks.

    `matrix` (m, n) must be finite; the result is in float64 if it is, otherwise in float32. `start` holds bases of the
    same sides to begin from (may be empty) and `generator` draws the sketch; only `randomized` reads the two.
    Singular vectors have arbitrary signs: see `with_signs`. Raises `LinAlgError`.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    matrix = matrix.to(wide)

    def compute(matrix: Tensor) -> Bases:
        if method == "exact":
            return _exact(matrix, rank, sides)
        if method == "gram":
            return _gram(matrix, rank, sides)
        assert method == "randomized", method
        return _randomized(matrix, rank, sides, start, generator)

    vectors = _with_retry(compute, matrix)
    return {side: vectors[side].to(wide) for side in sides}


def _with_retry(compute: Callable[[Tensor], Bases], matrix: Tensor) -> Bases:
    """`compute(matrix)`, or the same on the CPU in float64, where LAPACK converges on what a device may not."""
    try:
        return compute(matrix)
    except torch.linalg.LinAlgError:
        return {side: vectors.to(matrix) for side, vectors in compute(matrix.cpu().double()).items()}


def _exact(matrix: Tensor, rank: int, sides: tuple[str, ...]) -> Bases:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return {LEFT: u[:, :rank], RIGHT: vt[:rank]}


def _gram(matrix: Tensor, rank: int, sides: tuple[str, ...]) -> Bases:
    tall = matrix.shape[0] >= matrix.shape[1]
    a = (matrix if tall else matrix.T).double()  # (long, short)
    _, vectors = torch.linalg.eigh(a.T @ a)  # eigenvalues ascend
    short = vectors[:, -rank:].flip(1)  # (short, r)
    return _both_sides(a, short, tall, sides)


def _randomized(matrix: Tensor, rank: int, sides: tuple[str, ...], start: Bases, generator: torch.Generator) -> Bases:
    tall = matrix.shape[0] >= matrix.shape[1]
    a = matrix if tall else matrix.T  # (long, short)
    width = min(rank + _OVERSAMPLING, a.shape[1])
    begin = _starting_columns(a, tall, start)  # (short, r) or (short, 0)
    noise = torch.randn(a.shape[1], width - begin.shape[1], generator=generator, dtype=torch.float64)
    x = torch.cat([begin.to(a), noise.to(a)], dim=1)  # (short, k)
    for _ in range(1 if begin.shape[1] else 2):  # a basis in use is worth one pass over the gradient
        x, _ = torch.linalg.qr(a.T @ (a @ x))
    y = (a @ x).double()  # (long, k)
    _, rotation = torch.linalg.eigh(y.T @ y)  # (k, k)
    short = x @ rotation[:, -rank:].flip(1).to(x)  # (short, r)
    return _both_sides(a, short, tall, sides)


def _starting_columns(a: Tensor, tall: bool, start: Bases) -> Tensor:
    """The basis in use, on the shorter side of the gradient."""
    short_side, long_side = (RIGHT, LEFT) if tall else (LEFT, RIGHT)
    if short_side in start:
        return start[RIGHT].T if tall else start[LEFT]
    if long_side in start:
        return a.T @ (start[LEFT] if tall else start[RIGHT].T).to(a)
    return a.new_empty(a.shape[1], 0)


def _both_sides(a: Tensor, short: Tensor, tall: bool, sides: tuple[str, ...]) -> Bases:
    """From the vectors of the shorter side (short, r) to those that `sides` asks for.

    Those of the longer side are A v / σ. QR normalises them and stays orthonormal where σ is 0.
    """
    short_side, long_side = (RIGHT, LEFT) if tall else (LEFT, RIGHT)
    found: Bases = {short_side: short.T if short_side == RIGHT else short}
    if long_side in sides:
        long = positive_qr(a @ short.to(a))
        found[long_side] = long.T if long_side == RIGHT else long
    return found


def positive_qr(matrix: Tensor) -> Tensor:
    """Q (m, r) of the QR decomposition whose R has a positive diagonal, which makes it unique."""
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal()
    return q * torch.where(diagonal < 0, -1, 1).to(q)


def with_signs(vectors: Tensor, old: Tensor | None, dim: int) -> Tensor:
    """Turn each vector (along `dim`) towards the old one; without an old one make its largest entry positive.

    Signs of singular vectors are arbitrary, but the moments outlive a refresh. With this rule runs agree across ranks,
    devices and SVD methods.
    """
    if old is None:
        score = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    else:
        score = (vectors * old.to(vectors.dtype)).sum(dim, keepdim=True)
    return torch.where(score < 0, -vectors, vectors)


def random_stiefel(rows: int, rank: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """P (rows, rank), float64, uniform on the Stiefel manifold: PᵀP = I and E[PPᵀ] = (rank / rows) I.

    The Q factor of a Gaussian matrix, with the signs that make it unique, has the same law as Z (ZᵀZ)^(-1/2) (GoLore,
    arXiv 2410.11289, section 4). Drawn on the CPU, so that every kind of device gets the same numbers.
    """
    return positive_qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64).to(device))
