"""LDAdam: Adam in a subspace that moves in every update, with error feedback (arXiv 2410.16103).

For a weight W (m, n) with m <= n, at this weight's 0-based update t, with k = t + 1 (for m > n all is transposed):

    A = G + e                                                                              (m, n)
    t = 0:  P = the top r left singular vectors of A,  C = 0
    t > 0:  B = ρ P_old M / (1-β1^t) + (1-ρ) A,  P = qr(B (Bᵀ P_old)),  C = Pᵀ P_old       (m, r), (r, r)
    a = Pᵀ A,  M' = C M                                                                    (r, n)
    e = A - P a + β1/(1-β1) (P_old M - P M')                                               (m, n)
    t > 0:  V = (1-β2^t) |(C∘C) (V/(1-β2^t) - (M/(1-β1^t))²) + (M'/(1-β1^t))²|             (r, n)
    M = β1 M' + (1-β1) a,  V = β2 V + (1-β2) a²
    W <- W - lr P [M/(1-β1^k)] / [√(V/(1-β2^k)) + ε]

Signs of P's columns cancel. The authors keep e in `p.grad`; here it is a tensor of the state, which nobody's zeroing or
clipping of gradients reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods._matrices.method import MatrixTraining, adam_arguments
from peft_pretraining.optim import (
    Collective,
    Direction,
    Lift,
    MatrixOptimizer,
    ParamUpdate,
    Phases,
    StateTensor,
    UpdateRule,
)
from peft_pretraining.optim.basis.svd import gram_eigenvectors, short_gram
from peft_pretraining.optim.rules.batches import Batch, Batches
from peft_pretraining.optim.tensors.moving_weights import moving_lots
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, Projection


class LDAdamTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        return {
            **objects(method.rank, method.ldadam_rho, method.error_feedback),
            "betas": (method.ldadam_beta1, method.ldadam_beta2),
            "eps": adam_arguments(self.config)["eps"],
        }

    def sharded_dimension(self, name: str, param: Tensor) -> int:
        """The longer side, along which moments are divided, too."""
        return 1 if param.ndim == 2 and param.shape[0] <= param.shape[1] else 0


def objects(rank: int, rho: float = 0.908, error_feedback: bool = True) -> dict[str, Any]:
    """Rule and lift of a group."""
    return {"rule": MovingSubspaceAdam(rank, rho, error_feedback), "lift": MovedBack()}


class MovingSubspaceAdam(UpdateRule):
    """[M/(1-β1^k)] / [√(V/(1-β2^k)) + ε] (r, n), in the coordinates of the subspace that it has moved on.

    Devices may divide the longer side of a matrix, and its moments with it: the basis (short, r), which all of them
    have, is made of one sum of its size in each update."""

    name = "ldadam"
    masks = True
    decays_first = True
    betas = (0.908, 0.99)
    BASIS, ERROR = "basis", "error"

    def __init__(self, rank: int, rho: float = 0.908, error_feedback: bool = True):
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self._rank, self._rho, self._feeds_back = rank, rho, error_feedback

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        if like.ndim != 2:
            raise ValueError(f"LDAdam is for matrices, got shape {tuple(like.shape)}")
        m, n = shard.shape or like.shape
        long = 1 if m <= n else 0
        if shard.dim not in (None, long):
            raise ValueError(f"LDAdam divides the longer side of a matrix over devices, got {(m, n)} by {shard.dim}")
        rank = min(self._rank, m, n)
        divided = (None, None) if shard.dim is None else (1, max(m, n))
        moments = {key: like.new_zeros(rank, like.shape[long]) for key in ("exp_avg", "exp_avg_sq")}
        declared = {key: StateTensor(value, *divided) for key, value in moments.items()}
        declared[self.BASIS] = StateTensor(like.new_zeros(min(m, n), rank))
        if self._feeds_back:
            declared[self.ERROR] = StateTensor.like_gradient(torch.zeros_like(like), shard)
        return declared

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        batches = Batches(updates)
        seen = [self._seen(batch) for batch in batches]
        answers = yield [
            Collective(self._of_next_basis(batch, a, group["betas"][0]), batch.shard)
            for batch, a in zip(batches, seen, strict=True)
        ]
        for batch, a, answer in zip(batches, seen, answers, strict=True):
            direction = self._direction(batch, a, batch.masked(answer), group)
            batches.answer(batch, direction, batch.rate / (1 - group["betas"][0] ** batch.k))
        return batches.directions()

    def _seen(self, batch: Batch) -> Tensor:
        """A (short, long), in the place of the error where there is one."""
        a = batch.state(self.ERROR).add_(batch.grad) if self._feeds_back else batch.grad
        return a if _is_wide(batch.weight_shard) else a.mT

    def _of_next_basis(self, batch: Batch, a: Tensor, beta1: float) -> Tensor:
        """What, added up over devices, the next basis is made of: AAᵀ at first, then B (Bᵀ P_old) (short, r).

        P_old is orthonormal, so (Bᵀ P_old)ᵀ = ρ M / (1-β1^t) + (1-ρ) P_oldᵀ A, and B itself is never made.
        """
        t = batch.k - 1
        if t == 0:
            return batch.together([short_gram(part, LEFT) for part in batch.split(a)])
        old, momentum, weight = batch.state(self.BASIS), batch.state("exp_avg"), self._rho / (1 - beta1**t)
        inner = (old.mT @ a).mul_(1 - self._rho).add_(momentum, alpha=weight)  # (r, long)
        answer = weight * (old @ (momentum @ inner.mT))
        return answer.add_(a @ inner.mT, alpha=1 - self._rho)

    def _direction(self, batch: Batch, a: Tensor, answer: Tensor, group: dict[str, Any]) -> Tensor:
        """M / (√V̂ + ε), with the subspace, both moments and the error moved on."""
        (beta1, beta2), k = group["betas"], batch.k
        basis, first, second = batch.state(self.BASIS), batch.state("exp_avg"), batch.state("exp_avg_sq")
        new = self._first_basis(batch, answer, basis) if k == 1 else torch.linalg.qr(answer)[0]
        turned = new.mT @ basis  # C (r, r), zero at first
        low, moved = new.mT @ a, turned @ first
        if self._feeds_back:  # `a` is the error's tensor
            lost = beta1 / (1 - beta1)
            _subtract_product(a, new, torch.add(low, moved, alpha=lost))
            _subtract_product(a, basis, first * -lost)
        if k > 1:
            of_first, of_second = 1 - beta1 ** (k - 1), 1 - beta2 ** (k - 1)
            spread = (second / of_second).addcmul_(first, first, value=-(of_first**-2))
            torch.matmul(turned.square(), spread, out=second)
            second.addcmul_(moved, moved, value=of_first**-2).abs_().mul_(of_second)
        torch.lerp(low, moved, beta1, out=first)
        second.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        basis.copy_(new)
        root = torch.div(second, 1 - beta2**k, out=low).sqrt_().add_(group["eps"])
        return torch.div(first, root, out=moved)

    def _first_basis(self, batch: Batch, grams: Tensor, basis: Tensor) -> Tensor:
        """The top eigenvectors of each."""
        rank = basis.shape[-1]
        return batch.together([gram_eigenvectors(gram, rank, LEFT, basis.dtype)[LEFT] for gram in batch.split(grams)])


class MovedBack(Lift):
    """W <- W - factor P D, P being the basis that the rule keeps."""

    masks = True

    def move(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> None:
        for lot in moving_lots(updates):
            for update, rows, weight in lot:
                assert update.direction is not None
                basis, (direction, factor, _) = update.state[MovingSubspaceAdam.BASIS], update.direction
                wide = _is_wide(update.shard)
                bases = {LEFT: basis} if wide else {RIGHT: basis.T}
                projection = Projection.for_weight("left" if wide else "right", basis.shape[1], update.shard)
                projection.add_projected_back(weight, bases, direction if wide else direction.T, -factor, rows)


def _is_wide(shard: ShardInfo) -> bool:
    """Whether the rows of a matrix are its shorter side."""
    return shard.shape[0] <= shard.shape[1]


def _subtract_product(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """matrix <- matrix - left right, of one or of many."""
    if matrix.ndim == 2:
        matrix.addmm_(left, right, alpha=-1)
    else:
        matrix.baddbmm_(left, right, alpha=-1)


class LDAdam(MatrixOptimizer):
    """LDAdam for other loops: matrices as above, everything else by AdamW (`adam_betas`, `adam_eps`).

    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = LDAdam([weight], lr=0.001, rank=2)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'exp_avg': (2, 6), 'exp_avg_sq': (2, 6), 'basis': (4, 2), 'error': (6, 4)}
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        rank: int = 128,
        rho: float = 0.908,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        error_feedback: bool = True,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        **settings: Any,
    ):
        matrices = {**objects(rank, rho, error_feedback), "betas": betas, "eps": eps}
        super().__init__(
            params, matrices=matrices, lr=lr, betas=adam_betas, eps=adam_eps, weight_decay=weight_decay, **settings
        )
