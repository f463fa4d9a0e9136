"""The leading singular vectors of a gradient, by three methods behind one interface, and uniformly random bases.

* `exact`: a full SVD (LAPACK, cuSOLVER), in float32 for float32 and bf16 gradients.
* `gram`: eigenvectors of the Gram matrix of the shorter side. Squaring halves the digits, so it is formed in float64:
  in float32 directions with singular values below 1e-4 of the largest would be noise.
* `randomized`: a step of subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) from the
  basis in use or from a Gaussian sketch, and of its columns the singular vectors of the Nyström approximation (Tropp,
  Yurtsever, Udell and Cevher, arXiv 1706.05736, algorithm 3), which takes no further product with the gradient.

Every routine gets finite input, works in float32 or float64, and falls back to the CPU in float64 when the device's
routine does not converge. What fails there, too, raises `LinAlgError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import HALF
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, Bases

if TYPE_CHECKING:  # torch does not export it for type checkers

    class LinAlgError(RuntimeError): ...

else:
    from torch.linalg import LinAlgError

SVD_METHODS = ("exact", "gram", "randomized")

OVERSAMPLING = 8
"""Columns of the randomised method, and of sketches, beyond the rank; Halko et al. recommend 5 to 10."""

_NUMBERS_AT_ONCE = 2**22
"""Of a gradient in another dtype: 32 MB in float64. A whole copy of the largest of LLaMA-7B would have 361 MB."""


def top_singular_vectors(
    matrix: Tensor, rank: int, sides: tuple[str, ...], method: str, start: Bases, generator: torch.Generator
) -> Bases:
    """The first `rank` left singular vectors (m, r), right ones (r, n), or both, as `sides` asks.

    `matrix` (m, n) must be finite; the result is in float64 if it is, otherwise in float32. `start` holds bases of the
    same sides to begin from (may be empty) and `generator` draws the sketch; only `randomized` reads the two.
    Singular vectors have arbitrary signs: see `with_signs`. Raises `LinAlgError`.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    if method != "gram":  # which converts it block by block
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
    except LinAlgError:
        return {side: vectors.to(matrix.device) for side, vectors in compute(matrix.cpu().double()).items()}


def _exact(matrix: Tensor, rank: int, sides: tuple[str, ...]) -> Bases:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return {LEFT: u[:, :rank], RIGHT: vt[:rank]}


def _gram(matrix: Tensor, rank: int, sides: tuple[str, ...]) -> Bases:
    tall = matrix.shape[0] >= matrix.shape[1]
    a = matrix if tall else matrix.T  # (long, short)
    vectors = _eigenvectors(_gram_of_columns(a), in_place=a.dtype in HALF)
    short = vectors[:, -rank:].flip(1)  # (short, r)
    return _both_sides(a, short, tall, sides)


def _eigenvectors(gram: Tensor, in_place: bool) -> Tensor:
    """Of a symmetric matrix, by ascending eigenvalues. `in_place`: in its memory, from its other triangle, which may
    differ in the last digits."""
    if not in_place:
        vectors: Tensor = torch.linalg.eigh(gram)[1]
        return vectors
    columns = gram.mT  # LAPACK and cuSOLVER store matrices by columns
    torch.linalg.eigh(columns, out=(gram.new_empty(len(gram)), columns))
    return columns


def _row_blocks(a: Tensor) -> tuple[Tensor, ...]:
    """Consecutive rows of a matrix, `_NUMBERS_AT_ONCE` at a time; all of a smaller one."""
    return torch.split(a, max(1, _NUMBERS_AT_ONCE // max(1, a.shape[1])))


def _gram_of_columns(a: Tensor) -> Tensor:
    """AᵀA (s, s) in float64 of A (l, s), which is converted and added up by blocks of rows."""
    first, *others = _row_blocks(a)
    wide = first.double()
    gram = wide.T @ wide
    for block in others:
        del wide  # before the next block is converted
        wide = block.double()
        gram.addmm_(wide.T, wide)
    return gram


def flags_of(part: Tensor) -> Tensor:
    """(2,) float32 numbers that are not zero if some entry of a matrix is not finite, and if some is not zero."""
    if part.device.type == "cpu" and part.dtype not in HALF:
        # A norm takes a tenth of the time, and mostly tells: it is 0 or infinite for tiny or huge numbers.
        norm = float(torch.linalg.vector_norm(part))
        if 0 < norm < float("inf"):
            return torch.tensor([0.0, 1.0])
    flags = [torch.stack([~block.isfinite().all(), block.any()]) for block in _row_blocks(part)]
    return (flags[0] if len(flags) == 1 else torch.stack(flags).any(0)).float()


def squared_norm(part: Tensor) -> Tensor:
    """The square of a matrix's 2-norm, in float64: the squares of a small float32 gradient underflow."""
    squares = [torch.linalg.vector_norm(block, dtype=torch.float64).square() for block in _row_blocks(part)]
    return squares[0] if len(squares) == 1 else torch.stack(squares).sum()


def _randomized(matrix: Tensor, rank: int, sides: tuple[str, ...], start: Bases, generator: torch.Generator) -> Bases:
    tall = matrix.shape[0] >= matrix.shape[1]
    a = matrix if tall else matrix.T  # (long, short)
    x = _starting_columns(a, tall, start, min(rank + OVERSAMPLING, a.shape[1]), generator)  # (short, k)
    z = a.T @ (a @ x)
    q, r = torch.linalg.qr(z)
    # AᵀA is nearly Z (XᵀZ)⁻¹ Zᵀ = Q (FᵀF) Qᵀ. The shift is what rounding may take from the least eigenvalue of XᵀZ.
    inner = (x.T @ z).double()
    inner.diagonal().add_(10 * torch.finfo(z.dtype).eps * inner.trace() + torch.finfo(torch.float64).tiny)
    f = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), r.T.double(), upper=False)  # (k, k)
    _, rotation = torch.linalg.eigh(f.T @ f)
    short = q @ rotation[:, -rank:].flip(1).to(q)  # (short, r)
    return _both_sides(a, short, tall, sides)


def _starting_columns(a: Tensor, tall: bool, start: Bases, width: int, generator: torch.Generator) -> Tensor:
    """Nearly orthonormal columns (short, width): the basis in use and Gaussian ones, on the shorter side as they are,
    on the longer side (and where there is no basis) taken to the shorter one by Aᵀ."""

    def columns(side: str) -> Tensor:
        rows = a.shape[0 if side == long_side else 1]
        known = a.new_empty(rows, 0)
        if side in start:
            known = (start[side] if side == LEFT else start[side].T).to(a)
        drawn = torch.randn(rows, width - known.shape[1], generator=generator, dtype=torch.float64)
        return torch.cat([known, drawn.to(a) / rows**0.5], dim=1)

    short_side, long_side = (RIGHT, LEFT) if tall else (LEFT, RIGHT)
    return columns(short_side) if short_side in start else torch.linalg.qr(a.T @ columns(long_side))[0]


def _both_sides(a: Tensor, short: Tensor, tall: bool, sides: tuple[str, ...]) -> Bases:
    """From the vectors of the shorter side (short, r) to those that `sides` asks for.

    Those of the longer side are A v / σ. QR normalises them and stays orthonormal where σ is 0.
    """
    short_side, long_side = (RIGHT, LEFT) if tall else (LEFT, RIGHT)
    found: Bases = {short_side: short.T if short_side == RIGHT else short}
    if long_side in sides:
        long = positive_qr(torch.cat([block.to(short.dtype) @ short for block in _row_blocks(a)]))
        found[long_side] = long.T if long_side == RIGHT else long
    return found


def short_gram(part: Tensor, side: str) -> Tensor:
    """The Gram matrix of the shorter side, in float64; of a part of a matrix whose longer side is divided over devices,
    what it adds to the sum."""
    return _gram_of_columns(part if side == RIGHT else part.T)


def gram_eigenvectors(gram: Tensor, rank: int, side: str, dtype: torch.dtype) -> Bases:
    """The basis of the shorter side by `gram`, from the whole Gram matrix (s, s), in float32 at least. Raises
    `LinAlgError`."""
    try:
        _, vectors = torch.linalg.eigh(gram)
    except LinAlgError:
        vectors = torch.linalg.eigh(gram.cpu())[1].to(gram)
    vectors = vectors[:, -rank:].flip(1).to(torch.promote_types(dtype, torch.float32))
    return {side: vectors.T if side == RIGHT else vectors}


def positive_qr(matrix: Tensor) -> Tensor:
    """Q (m, r) of the QR decomposition whose R has a positive diagonal, which makes it unique."""
    q, r = torch.linalg.qr(matrix)
    signs: Tensor = torch.where(r.diagonal() < 0, -1, 1).to(q)
    result: Tensor = q * signs
    return result


def with_signs(vectors: Tensor, old: Tensor | None, dim: int) -> Tensor:
    """Turn each vector (along `dim`) towards the old one; without an old one make its largest entry positive.

    Signs of singular vectors are arbitrary, but the moments outlive a refresh. With this rule runs agree across ranks,
    devices and SVD methods.
    """
    if old is None:
        score = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    else:
        score = (vectors * old.to(vectors.dtype)).sum(dim, keepdim=True)
    if vectors.device.type == "cpu" and not (score < 0).any():
        return vectors
    return torch.where(score < 0, -vectors, vectors)


def random_stiefel(rows: int, rank: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """P (rows, rank), float64, uniform on the Stiefel manifold: PᵀP = I and E[PPᵀ] = (rank / rows) I.

    Drawn on the CPU, so that every kind of device gets the same numbers, and decomposed on `device`.
    """
    return on_stiefel(gaussian(rows, rank, generator), device)


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix of standard normal numbers in float64, on the CPU, by one thread: 50 to 70 million numbers a second."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def on_stiefel(drawn: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The Q factor of a Gaussian matrix Z, with the signs that make it unique: it has the same law as Z (ZᵀZ)^(-1/2)
    (GoLore, arXiv 2410.11289, section 4)."""
    return positive_qr(drawn.to(device))
