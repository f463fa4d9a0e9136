"""SOAP: Adam in the eigenbasis of Shampoo's Gram matrices (arXiv 2409.11321).

For a weight W (m, n), with L = EMA(G Gᵀ, β2) and K = EMA(Gᵀ G, β2). The first update only fills them, and takes their
eigenvectors Q_L (m, m) and Q_R (n, n). In the k-th one after it, with c_k = √(1-β2^k) / (1-β1^k):

    G' = Q_Lᵀ G Q_R,  M = EMA(G, β1),  V = EMA(G'², β2)
    W <- W - lr c_k Q_L [(Q_Lᵀ M Q_R) / (√V + ε)] Q_Rᵀ,  W <- W - lr weight_decay W
    L and K move on; if k % update_proj_gap == 0, for both sides:
        columns of Q by falling diag(Qᵀ L Q), and V in the same order;  Q <- qr(L Q)

Signs of the columns do not matter. Where a Gram matrix is singular at first (always that of the longer side) the basis
of its null space is anything, and the trajectory depends on it: here it is a smooth function of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods._matrices.method import MatrixTraining
from peft_pretraining.optim import Collective, Direction, MatrixOptimizer, ParamUpdate, Phases, StateTensor, UpdateRule
from peft_pretraining.optim.tensors.full_precision import full_float32_products

_SIDES = (0, 1)


class SoapTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        rule = SoapRule(method.update_proj_gap, method.soap_max_side)
        return {"rule": rule, "betas": (method.matrix_momentum, method.soap_beta2)}


class SoapRule(UpdateRule):
    """Devices that divide a matrix put its gradient together, and all keep the whole state.

    `first`: the first eigenvectors of both sides, where they are given.
    """

    betas = (0.95, 0.95)
    name = "soap"

    def __init__(self, gap: int = 10, max_side: int = 10_000, first: Sequence[Tensor] | None = None):
        if gap < 0:
            raise ValueError(f"gap must be at least 0, got {gap}")
        self._gap, self._max_side, self._first = gap, max_side, first

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        if like.ndim != 2:
            raise ValueError(f"soap is for matrices, got a parameter of shape {tuple(like.shape)}")
        shape = shard.shape or like.shape
        shapes = {"exp_avg": tuple(shape), "exp_avg_sq": tuple(shape)}
        for side in self._sides(shape):
            shapes |= {f"gram_{side}": (shape[side],) * 2, f"vectors_{side}": (shape[side],) * 2}
        return {key: StateTensor(like.new_zeros(size)) for key, size in shapes.items()}

    def _sides(self, shape: Sequence[int]) -> list[int]:
        """Those that have a basis."""
        return [side for side in _SIDES if shape[side] <= self._max_side]

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        grads = yield [Collective(update.low_rank_grad, update.low_rank_shard, "whole") for update in updates]
        with full_float32_products():
            return [self._direction(*each, group) for each in zip(updates, grads, strict=True)]

    def _direction(self, update: ParamUpdate, grad: Tensor, group: dict[str, Any]) -> Direction | None:
        """This device's part of D; then the bases and their Gram matrices move on."""
        (beta1, beta2), state, k = group["betas"], update.state, update.k - 1
        sides = self._sides(grad.shape)
        direction = None
        if k > 0:
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].lerp_(self._into_bases(state, grad, sides).square_(), 1 - beta2)
            moment = self._into_bases(state, state["exp_avg"], sides)
            found = self._out_of_bases(state, moment / (state["exp_avg_sq"].sqrt() + group["eps"]), sides)
            correction = math.sqrt(1 - beta2**k) / (1 - beta1**k)
            shard = update.low_rank_shard
            direction = Direction(shard.part(found, shard.dim or 0), update.rate * correction)
        for side in sides:
            state[f"gram_{side}"].lerp_(grad @ grad.mT if side == 0 else grad.mT @ grad, 1 - beta2)
        if k == 0:
            first = self._first or first_bases(grad)
            for side in sides:
                state[f"vectors_{side}"].copy_(first[side])
        elif self._gap and k % self._gap == 0:
            for side in sides:
                _turn(state, side)
        return direction

    @staticmethod
    def _into_bases(state: dict[str, Tensor], matrix: Tensor, sides: Sequence[int]) -> Tensor:
        """Q_Lᵀ X Q_R; a copy."""
        result = state["vectors_0"].mT @ matrix if 0 in sides else matrix.clone()
        return result @ state["vectors_1"] if 1 in sides else result

    @staticmethod
    def _out_of_bases(state: dict[str, Tensor], matrix: Tensor, sides: Sequence[int]) -> Tensor:
        """Q_L X Q_Rᵀ."""
        result = state["vectors_0"] @ matrix if 0 in sides else matrix
        return result @ state["vectors_1"].mT if 1 in sides else result


def first_bases(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (m, m) of G Gᵀ and (n, n) of Gᵀ G, by falling eigenvalues, in float64 on the CPU.

    What belongs to eigenvalues that are nothing but rounding completes the others as Householder's reflections do:
    it changes as little as they do, so that devices that add in another order agree.
    """
    wide = grad.double().cpu()
    u, sizes, vt = torch.linalg.svd(wide, full_matrices=False)
    noise = sizes.max() * max(grad.shape) * torch.finfo(grad.dtype).eps
    rank = int((sizes > noise).sum())
    return _completed(u[:, :rank]), _completed(vt[:rank].mT)


def _completed(columns: Tensor) -> Tensor:
    """Orthonormal columns (m, r), and m - r further ones."""
    rows, count = columns.shape
    if count == 0:
        return torch.eye(rows, dtype=columns.dtype)
    whole = torch.linalg.qr(columns, mode="complete")[0]
    return torch.cat([columns, whole[:, count:]], dim=1)


def _turn(state: dict[str, Tensor], side: int) -> None:
    """One step of power iteration, with the columns, and the second moment's entries, in falling order."""
    gram, vectors, second = state[f"gram_{side}"], state[f"vectors_{side}"], state["exp_avg_sq"]
    order = (vectors * (gram @ vectors)).sum(0).argsort(descending=True, stable=True)
    second.copy_(second.index_select(side, order))
    vectors.copy_(torch.linalg.qr(gram @ vectors[:, order])[0])


class SOAP(MatrixOptimizer):
    """SOAP for other loops: matrices as above, everything else by AdamW (`adam_betas`).

    >>> weight = torch.nn.Parameter(torch.eye(4, 6))
    >>> optimizer = SOAP([weight], lr=3e-3)
    >>> for _ in range(2):  # the first update fills the Gram matrices alone
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> tuple(optimizer.state[weight]["vectors_1"].shape), bool((weight.diag() < 1).all())
    ((6, 6), True)

    `first_vectors` are both sides' first eigenvectors: for tests.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        gap: int = 10,
        max_side: int = 10_000,
        weight_decay: float = 0.01,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        first_vectors: Sequence[Tensor] | None = None,
        **settings: Any,
    ):
        matrices = {"rule": SoapRule(gap, max_side, first_vectors), "betas": betas}
        super().__init__(
            params, matrices=matrices, lr=lr, betas=adam_betas, eps=eps, weight_decay=weight_decay, **settings
        )
