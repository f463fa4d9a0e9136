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
from peft_pretraining.optim.tensors.collectives import together
from peft_pretraining.optim.tensors.full_precision import full_float32_products
from peft_pretraining.optim.tensors.param_update import guarded
from peft_pretraining.optim.tensors.state_tensor import zeros

_SIDES = (0, 1)
_LIKE_GRADIENT = ("grad", "exp_avg", "exp_avg_sq")


class SoapTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        rule = SoapRule(method.update_proj_gap, method.soap_max_side, shares_work=True)
        return {"rule": rule, "betas": (method.matrix_momentum, method.soap_beta2)}


class SoapRule(UpdateRule):
    """Of a matrix that devices divide, each keeps its rows of the state, and the owner gets all of it, moves it on and
    hands it back.

    `first`: the first eigenvectors of both sides, where they are given. `shares_work`: where all devices have the whole
    matrices, these come from the owner as well.
    """

    betas = (0.95, 0.95)
    name = "soap"
    masks = True

    def __init__(
        self,
        gap: int = 10,
        max_side: int = 10_000,
        first: Sequence[Tensor] | None = None,
        shares_work: bool = False,
    ):
        if gap < 0:
            raise ValueError(f"gap must be at least 0, got {gap}")
        self._gap, self._max_side, self._first, self.shares_work = gap, max_side, first, shares_work

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def must_know(self, k: int) -> bool:
        return k == 1 or self._turns(k - 1)  # decompositions

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        if like.ndim != 2:
            raise ValueError(f"soap is for matrices, got a parameter of shape {tuple(like.shape)}")
        shape = shard.shape or like.shape
        declared = {key: StateTensor.like_gradient(zeros(like), shard) for key in ("exp_avg", "exp_avg_sq")}
        for side in self._sides(shape):
            square = shard.of_shape((shape[side],) * 2)
            rows = shape[side] if square.dim is None else square.size
            for key in (f"gram_{side}", f"vectors_{side}"):
                declared[key] = StateTensor.like_gradient(like.new_zeros(rows, shape[side]), square)
        return declared

    def _sides(self, shape: Sequence[int]) -> list[int]:
        """Those that have a basis."""
        return [side for side in _SIDES if shape[side] <= self._max_side]

    def _turns(self, k: int) -> bool:
        """Whether the k-th update after the first one ends with a step of the bases."""
        return k > 0 and self._gap > 0 and k % self._gap == 0

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        (beta1, beta2), later = group["betas"], [update for update in updates if update.k > 1]
        with guarded(updates, "exp_avg", "exp_avg_sq", "gram_0", "gram_1"):
            moments = [update.state["exp_avg"] for update in later]
            if later:
                torch._foreach_lerp_(moments, [update.low_rank_grad for update in later], 1 - beta1)
            wholes = yield from together([self._at_the_owner(update) for update in updates])
            with full_float32_products():
                found = [self._move_on(*each, group) for each in zip(updates, wholes, strict=True)]
            parts = yield from together([self._handed_back(*each) for each in zip(updates, wholes, found, strict=True)])
        return [
            None if part is None else Direction(part, update.rate * _correction(update, beta1, beta2))
            for part, update in zip(parts, updates, strict=True)
        ]

    def _shard_of(self, update: ParamUpdate, key: str) -> ShardInfo:
        """How a tensor of the state is divided."""
        shard = update.low_rank_shard
        return shard if key in _LIKE_GRADIENT else shard.of_shape((shard.shape[int(key[-1])],) * 2)

    def _at_the_owner(self, update: ParamUpdate) -> Phases[dict[str, Tensor]]:
        """The state, and G as `grad`: whole where this device does the work, else empty tensors."""
        state = {**update.state, "grad": update.low_rank_grad}
        if update.low_rank_shard.dim is None:
            return state
        keys = [key for key in state if key in _LIKE_GRADIENT or key.startswith(("gram", "vectors"))]
        if update.k == 1:
            keys = ["grad"]
        wholes = yield [Collective(state[key], self._shard_of(update, key), "to_owner", update.owner) for key in keys]
        state |= dict(zip(keys, wholes, strict=True))
        if update.k == 1:
            for side in self._sides(update.low_rank_shard.shape) if update.is_owner else ():
                size = (update.low_rank_shard.shape[side],) * 2
                state |= {key: state["grad"].new_zeros(size) for key in (f"gram_{side}", f"vectors_{side}")}
        return state

    def _handed_back(
        self, update: ParamUpdate, whole: dict[str, Tensor], found: Tensor | None
    ) -> Phases[Tensor | None]:
        """This device's part of D, after its part of the state has been put in place."""
        sides, shard = self._sides(update.low_rank_shard.shape), update.low_rank_shard
        keys = [f"vectors_{side}" for side in sides] if update.k == 1 or self._turns(update.k - 1) else []
        if shard.dim is None:
            keys = keys if update.k == 1 else []
        else:
            keys += [f"gram_{side}" for side in sides] + (["exp_avg_sq"] if update.k > 1 else [])
        nothing = update.low_rank_grad.new_empty(0)
        moved = [(whole[key] if update.is_owner else nothing, self._shard_of(update, key)) for key in keys]
        if update.k > 1 and shard.dim is not None:
            moved.append((nothing if found is None else found, shard))
        if not moved:
            return found
        parts = yield [Collective(*each, "from_owner", update.owner) for each in moved]
        for key, part in zip(keys, parts, strict=False):  # D comes last
            update.state[key].copy_(part)
        return parts[-1] if len(parts) > len(keys) else found

    def _move_on(self, update: ParamUpdate, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor | None:
        """D (m, n), after M has moved on; then the second moment, the Gram matrices and the bases move on as well.
        `state` is of whole matrices."""
        beta2, k, shard = group["betas"][1], update.k - 1, update.low_rank_shard
        if shard.dim is not None and not update.is_owner:
            return None
        sides, grad, direction = self._sides(shard.shape), state["grad"], None
        if k > 0:
            turned = self._into_bases(state, grad, sides)
            state["exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
            moment = self._into_bases(state, state["exp_avg"], sides)
            moment.div_(state["exp_avg_sq"].sqrt().add_(group["eps"]))
            direction = self._out_of_bases(state, moment, sides)
            if update.mask is not None:
                update.mask.zero_(direction)
        for side in sides:
            both = (grad, grad.mT) if side == 0 else (grad.mT, grad)
            state[f"gram_{side}"].addmm_(*both, beta=beta2, alpha=1 - beta2)
        if k == 0 and update.is_owner:
            first = self._first or first_bases(grad)
            for side in sides:
                state[f"vectors_{side}"].copy_(first[side])
        if self._turns(k):
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


def _correction(update: ParamUpdate, beta1: float, beta2: float) -> float:
    """c_k."""
    k = update.k - 1
    return math.sqrt(1 - beta2**k) / (1 - beta1**k) if k else 0.0


def first_bases(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (m, m) of G Gᵀ and (n, n) of Gᵀ G, by falling eigenvalues, in float64 on the CPU.

    What belongs to eigenvalues that are nothing but rounding completes the others as Householder's reflections do:
    it changes as little as they do, so that devices that add in another order agree. Of a gradient that is not finite:
    those of zeros.
    """
    wide = grad.double().cpu()
    if not bool(wide.isfinite().all()):  # LAPACK may never return
        wide = torch.zeros_like(wide)
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
