"""The dominant subspace of a gradient by subspace iteration from the basis in use, for many matrices side by side.

A round takes a basis X (s, r) to Q, the Q factor of S X with S = AᵀA, for a gradient A (l, s) whose basis is on the
side of length s: two thin products with A, and nothing of the size s x s. Between two refreshes a gradient's subspace
moves little, so one round mostly does; a first basis starts from a random sketch and takes more (Halko, Martinsson and
Tropp, arXiv 0909.4061, algorithm 4.4). Since R of the QR decomposition has a positive diagonal, columns keep their
places from one refresh to the next, and come in the order of the singular vectors (the iteration of QR algorithm).

* A is divided by ‖A‖, so that nothing under- or overflows, and S X gets a share of X, about the noise that rounding
  leaves in it: where A has no energy (rank below r) the old vectors stay, and no basis is ever undetermined.
* On the CPU the QR decomposition is LAPACK's, or that of `_next_columns`; on devices it is CholeskyQR2
  (Fukaya et al., 2014), batched over equal shapes: products and triangular solves, in float64 where digits are lost.
  Nothing waits for it: whether the Cholesky decompositions succeeded is read once for all matrices and rounds.
* Whether a round was enough is measured by the energy of Nyström's approximation (arXiv 1706.05736), a lower bound of
  what the basis captures: of tr S, which is an upper bound, or of what the last round has gained.
* Devices that hold different rows of A add up S X; those that hold different columns add up A X first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.basis.rows_with_energy import leave_out, squares_of
from peft_pretraining.optim.tensors.collectives import Collective, Phases
from peft_pretraining.optim.tensors.rounding import rows_at_once

WARM_ROUNDS, COLD_ROUNDS = 2, 6
"""At most, from a basis in use and from a sketch."""
_ENOUGH = 1e-3
"""Share of the energy that may be missing, by the bounds, when the iteration ends."""
_ORTHONORMAL = 40
"""Roundings that entries of QᵀQ may be off: 5e-6 in float32."""
_NEARLY = 1e-3
"""By what entries of QᵀQ may be off for a step of Newton and Schulz to make them right: it squares that."""
_NOISE = 1e-6
"""Share of X in S X: the least singular value that it can have, relative to its norm, and well above what rounding in
float32 takes away. The squares that CholeskyQR takes are far above float64's digits."""


@dataclass(eq=False)
class Iterate:
    """One matrix on its way."""

    grad: Tensor
    """A or Aᵀ: this device's part of the gradient."""
    columns: bool
    """Whether the basis is on the side of the columns of `grad` (right), or of its rows (left)."""
    shard: ShardInfo
    """Of `grad`."""
    basis: Tensor
    """X (s, r), nearly orthonormal, whole, in float32 or float64."""
    rank: int
    """How many of its first columns are wanted: a sketch has more."""
    rounds: int
    """At most."""
    places: Tensor | None = None
    """Of the rows of A that products are made of, on this device; None: of all."""
    later: tuple[Tensor | None, Tensor] | None = None
    """`places` and `norm` in the rounds after the first, if others."""
    shift: float = 0.0
    """The next round is one with S - shift I."""
    norm: Tensor | None = None
    """‖A‖ of these rows, float64."""
    captured: Tensor | None = None
    """Bounds of the energy, (2,): a share of ‖A‖² that the basis captures at least, and how much more it is than the
    basis before captured. NaN where a decomposition has failed."""

    @property
    def divided_side(self) -> bool:
        """Whether devices hold different parts of the side that the basis is on."""
        return self.shard.dim is not None and self.shard.dim == int(self.columns)

    def part(self) -> Tensor:
        """`grad`, or a copy of what is not left out of it."""
        return self.grad if self.places is None else self.grad.index_select(int(not self.columns), self.places)


def iterate(every: Sequence[Iterate], at_once: int) -> Phases[list[bool]]:
    """Improve each basis in place; returns whether that went well. Others have bases to forget.

    `at_once`: numbers of the bases of one shape that are decomposed together.
    """
    squares = yield [Collective(squares_of(each), each.shard) for each in every]
    for each, its in zip(every, squares, strict=True):
        leave_out(each, its, each.rounds <= WARM_ROUNDS)
    running, well = list(every), dict.fromkeys(map(id, every), True)
    for done in range(1, max((each.rounds for each in every), default=0) + 1):
        products = yield from _gram_products(running)
        _orthonormalize(running, products, at_once, done)
        for each in running:
            if each.later is not None:
                each.places, each.norm = each.later
        running = _unfinished(running, done, well)
        if not running:
            break
    for each in every:
        each.places = None
    return [well[id(each)] for each in every]


def _unfinished(running: list[Iterate], done: int, well: dict[int, bool]) -> list[Iterate]:
    """Those that a further round would help. The only place where the host reads from the device: one number for each,
    all at once."""
    captured = torch.stack([each.captured for each in running if each.captured is not None]).tolist()
    left = []
    for each, (share, gained) in zip(running, captured, strict=True):
        if share != share:  # NaN
            well[id(each)] = False
        elif not _enough(share, gained) and done < each.rounds:
            left.append(each)
    return left


def _enough(share: float, gained: float) -> bool:
    return min(1 - share, gained / 2 / max(share, _ENOUGH)) <= _ENOUGH


def _gram_products(running: Sequence[Iterate]) -> Phases[list[Tensor]]:
    """S X / ‖A‖² (s, r) of each, whole."""
    outer = iter((yield [Collective(_outer(each), each.shard) for each in running if each.divided_side]))
    parts = [_inner(each, next(outer)) if each.divided_side else _gram_product(each) for each in running]
    return (yield [Collective(part, each.shard) for part, each in zip(parts, running, strict=True)])


def _denominator(each: Iterate) -> Tensor:
    """‖A‖, in the basis's dtype."""
    assert each.norm is not None
    return each.norm.to(each.basis.dtype).clamp_min(torch.finfo(each.basis.dtype).tiny)


def _gram_product(each: Iterate) -> Tensor:
    """Aᵀ (A X) / ‖A‖², of a matrix that is not divided, or of this device's rows."""
    size, grad = _denominator(each), each.part()
    x = each.basis / size
    if grad.dtype == x.dtype:
        product = grad.mT @ (grad @ x) if each.columns else grad @ (grad.mT @ x)
    elif each.columns:  # in fewer digits: widened some rows at a time
        product = torch.zeros_like(x)
        for rows in _blocks(grad):
            wide = rows.to(x.dtype)
            product.addmm_(wide.mT, wide @ x)
    else:
        inner = x.new_zeros(grad.shape[1], x.shape[1])
        for rows, of_basis in zip(_blocks(grad), torch.split(x, rows_at_once(grad)), strict=True):
            inner.addmm_(rows.to(x.dtype).mT, of_basis)
        product = torch.cat([rows.to(x.dtype) @ inner for rows in _blocks(grad)])
    return product.div_(size)


def _blocks(grad: Tensor) -> tuple[Tensor, ...]:
    return torch.split(grad, rows_at_once(grad))


def _outer(each: Iterate) -> Tensor:
    """A X / ‖A‖ of this device's part of A: its share of a sum where the basis's side is divided, and its rows of the
    whole (l, r) where the other one is."""
    x = each.basis / _denominator(each)
    if each.divided_side:
        x = each.shard.part(x, 0)
    grad = each.part().to(x.dtype)
    return grad @ x if each.columns else grad.mT @ x


def _inner(each: Iterate, outer: Tensor) -> Tensor:
    """Aᵀ Y / ‖A‖ (s, r), with zeros where other devices' parts belong."""
    grad = each.part().to(outer.dtype)
    part = grad.mT @ outer if each.columns else grad @ outer
    whole = torch.zeros_like(each.basis)
    each.shard.part(whole, 0).copy_(part.div_(_denominator(each)))
    return whole


def other_sides(every: Sequence[Iterate], known: Sequence[Tensor]) -> Phases[list[Tensor]]:
    """Bases (l, r) of the other sides, the Q factors of A X, when `iterate` is done with X. `known` (l, r) are nearly
    orthonormal columns, to be kept where A has no energy."""
    asked = []
    for each, old in zip(every, known, strict=True):
        part = _outer(each)
        if each.shard.dim is not None and not each.divided_side:
            whole = torch.zeros_like(old)
            each.shard.part(whole, 0).copy_(part)
            part = whole
        asked.append(Collective(part, each.shard))
    products = yield asked
    found = []
    for product, old in zip(products, known, strict=True):
        shifted, _ = _with_noise(old[None], product[None])
        found.append(signed_qr(shifted)[0][0])
    return found


def _orthonormalize(running: Sequence[Iterate], products: Sequence[Tensor], at_once: int, done: int) -> None:
    """Give each its next basis after `done` rounds, those of equal shapes together (on the CPU one after the other)."""
    by_shape: dict[tuple[torch.Size, int, bool, torch.dtype], list[int]] = {}
    for place, each in enumerate(running):
        key = (each.basis.shape, each.rank, done == each.rounds, each.basis.dtype)
        by_shape.setdefault(key, []).append(place)
    for (shape, rank, last, _), places in by_shape.items():
        on_cpu = running[places[0]].basis.device.type == "cpu"
        together = 1 if on_cpu else max(1, at_once // shape.numel())
        for start in range(0, len(places), together):
            lot = [running[place] for place in places[start : start + together]]
            basis = _stacked([each.basis for each in lot])
            product = _stacked([products[place] for place in places[start : start + together]])
            if on_cpu and lot[0].shift:
                product = product - lot[0].shift * basis
            if on_cpu and done + 1 == lot[0].rounds and rank == shape[1]:
                found, captured = _next_columns(lot[0], product)
            else:
                found, captured = next_bases(basis, product, rank, last)
            for each, new, bounds in zip(lot, found.unbind(), captured.unbind(), strict=True):
                each.basis, each.captured = new, bounds


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))


def next_bases(basis: Tensor, product: Tensor, rank: int, last: bool) -> tuple[Tensor, Tensor]:
    """Q (L, s, k) with QᵀQ = I of products S X (L, s, k), tr S = 1, and the bounds of `Iterate.captured` for its first
    `rank` columns (L, 2), which say nothing but whether it failed when this round is the `last`."""
    product, noise = _with_noise(basis, product)
    q, r, failed = (signed_qr if product.device.type == "cpu" else cholesky_qr2)(product)
    bounds = product.new_zeros(len(product), 2)
    if not last:
        inner = basis.mT @ product  # Xᵀ (S + noise) X
        factor, info = torch.linalg.cholesky_ex(inner)
        nystrom = torch.linalg.solve_triangular(factor, r.mT[:, :, :rank], upper=False).square().sum((1, 2))
        share = nystrom - rank * noise.flatten()
        gained = nystrom - inner.diagonal(dim1=1, dim2=2)[:, :rank].sum(1)
        # Without a bound a further round is taken.
        bounds = torch.where((info == 0)[:, None], torch.stack([share, gained], dim=1), bounds.new_tensor([0.0, 1.0]))
    failed = failed | ~q.sum((1, 2)).isfinite()
    return q, torch.where(failed[:, None], torch.nan, bounds)


def _next_columns(each: Iterate, product: Tensor) -> tuple[Tensor, Tensor]:
    """What `next_bases` returns, of one matrix on the CPU before its last round: Q where the bound shows that it is
    enough, and otherwise columns F with which the last round ends as with Q itself, since F = Q R.

    F = (S X) L⁻ᵀ with L Lᵀ = Xᵀ S X is Nyström's factor, S ≈ F Fᵀ. Its singular values lie half as many digits apart as
    those of S X, so that CholeskyQR in its own dtype does for Q, with a step of Newton and Schulz where it is needed.
    The last round's S is shifted by half of about the least singular value wanted: what is below loses more by it.
    """
    basis = each.basis[None]
    shifted, noise = _with_noise(basis, product)
    inner = basis.mT @ shifted
    factor, info = torch.linalg.cholesky_ex(inner)
    columns = torch.linalg.solve_triangular(factor.mT, shifted, upper=True, left=False)
    nystrom = torch.linalg.vector_norm(columns).square()
    if int(info) or not nystrom > _NOISE:
        return next_bases(basis, product, each.rank, last=False)
    bounds = torch.stack([nystrom - each.rank * noise.squeeze(), nystrom - inner.diagonal(dim1=1, dim2=2).sum()])
    factor, info = torch.linalg.cholesky_ex(columns.mT @ columns)
    if int(info):
        return next_bases(basis, product, each.rank, last=False)
    share, gained = float(bounds[0]), float(bounds[1])
    if not _enough(share, gained):
        each.shift = float(factor.diagonal(dim1=1, dim2=2).min()) ** 2 / 2
        return columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True), bounds[None]
    q = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    error = q.mT @ q
    error.diagonal(dim1=1, dim2=2).sub_(1)
    most = float(error.abs().max())
    if not most < _NEARLY:
        return next_bases(basis, product, each.rank, last=False)
    if most > _ORTHONORMAL * torch.finfo(q.dtype).eps:
        q = torch.baddbmm(q, q, error, alpha=-0.5)
    return q, bounds[None]


def _with_noise(basis: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Products (L, s, r) with a share of X, and that share (L, 1, 1)."""
    size = torch.linalg.matrix_norm(product, keepdim=True)
    noise = _NOISE * size + torch.finfo(product.dtype).tiny
    return torch.addcmul(product, basis, noise), noise


def signed_qr(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q and R of (L, s, r), the diagonal of R not negative, and whether it failed (L,): never."""
    q, r = torch.linalg.qr(matrices)
    signs = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1, 1).to(q)
    return q * signs[:, None], r * signs[:, :, None], torch.zeros_like(signs[:, 0], dtype=torch.bool)


def cholesky_qr2(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by products alone, for matrices with a condition of up to 1e7: CholeskyQR in float64, which leaves the
    columns orthonormal to some digits, and once more in the matrices' own dtype, which finds the rest."""
    wide = matrices.double()
    first, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    nearly = torch.linalg.solve_triangular(first.mT, wide, upper=True, left=False).to(matrices)
    second, again = torch.linalg.cholesky_ex(nearly.mT @ nearly)
    q = torch.linalg.solve_triangular(second.mT, nearly, upper=True, left=False)
    return q, second.mT @ first.mT.to(second), (info != 0) | (again != 0)
