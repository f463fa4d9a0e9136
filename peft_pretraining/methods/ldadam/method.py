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
from peft_pretraining.optim import Collective, Direction, MatrixOptimizer, ParamUpdate, Phases, StateTensor, UpdateRule
from peft_pretraining.optim.basis.svd import gram_eigenvectors, short_gram
from peft_pretraining.optim.tensors.projection import LEFT


class LDAdamTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        return {
            "rule": MovingSubspaceAdam(method.rank, method.ldadam_rho, method.error_feedback),
            "betas": (method.ldadam_beta1, method.ldadam_beta2),
            "eps": adam_arguments(self.config)["eps"],
        }

    def sharded_dimension(self, name: str, param: Tensor) -> int:
        """The longer side, along which moments are divided, too."""
        return 1 if param.ndim == 2 and param.shape[0] <= param.shape[1] else 0


class MovingSubspaceAdam(UpdateRule):
    """Devices may divide the longer side of a matrix, and its moments with it: the basis (short, r), which all of them
    have, is made of one sum of its size in each update."""

    name = "ldadam"

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
        beta1, _ = group["betas"]
        seen = [self._seen(update) for update in updates]
        answers = yield [self._of_next_basis(update, a, beta1) for update, a in zip(updates, seen, strict=True)]
        return [
            Direction(self._direction(update, a, answer, group), update.rate)
            for update, a, answer in zip(updates, seen, answers, strict=True)
        ]

    def _seen(self, update: ParamUpdate) -> Tensor:
        """A (short, long), in the place of the error where there is one."""
        grad = update.low_rank_grad
        return _flat(update.state[self.ERROR].add_(grad) if self._feeds_back else grad, update)

    def _of_next_basis(self, update: ParamUpdate, a: Tensor, beta1: float) -> Collective:
        """What, added up over devices, the next basis is made of: AAᵀ at first, then B (Bᵀ P_old) (short, r).

        P_old is orthonormal, so Bᵀ P_old = ρ Mᵀ / (1-β1^t) + (1-ρ) Aᵀ P_old, and B itself is never made.
        """
        t = update.k - 1
        if t == 0:
            return Collective(short_gram(a, LEFT), update.shard)
        old, momentum = update.state[self.BASIS], update.state["exp_avg"]
        weight = self._rho / (1 - beta1**t)
        inner = weight * momentum.T + (1 - self._rho) * (a.T @ old)  # (long, r)
        return Collective(weight * (old @ (momentum @ inner)) + (1 - self._rho) * (a @ inner), update.shard)

    def _direction(self, update: ParamUpdate, a: Tensor, answer: Tensor, group: dict[str, Any]) -> Tensor:
        """P M̂ / (√V̂ + ε), in the weight's orientation, with the subspace, both moments and the error moved on."""
        (beta1, beta2), state, k = group["betas"], update.state, update.k
        basis, first, second = state[self.BASIS], state["exp_avg"], state["exp_avg_sq"]
        if k == 1:
            new = gram_eigenvectors(answer, basis.shape[1], LEFT, basis.dtype)[LEFT]
        else:
            new = torch.linalg.qr(answer)[0]
        turned = new.T @ basis  # C (r, r), zero at first
        low, moved = new.T @ a, turned @ first
        if self._feeds_back:  # `a` is the error's tensor
            lost = beta1 / (1 - beta1)
            a.addmm_(new, torch.add(low, moved, alpha=lost), alpha=-1).addmm_(basis, first, alpha=lost)
        if k > 1:
            of_first, of_second = 1 - beta1 ** (k - 1), 1 - beta2 ** (k - 1)
            spread = second / of_second - (first / of_first).square()
            second.copy_((turned.square() @ spread).add_((moved / of_first).square()).abs_().mul_(of_second))
        first.copy_(moved.mul_(beta1).add_(low, alpha=1 - beta1))
        second.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        basis.copy_(new)
        root = (second / (1 - beta2**k)).sqrt_().add_(group["eps"])
        return _flat(new @ (first / (1 - beta1**k)).div_(root), update)


def _flat(matrix: Tensor, update: ParamUpdate) -> Tensor:
    """A matrix of the weight's orientation with the shorter side first, or the other way round."""
    m, n = update.shard.shape or update.weight.shape
    return matrix if m <= n else matrix.T


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
        matrices = {"rule": MovingSubspaceAdam(rank, rho, error_feedback), "betas": betas, "eps": eps}
        super().__init__(
            params, matrices=matrices, lr=lr, betas=adam_betas, eps=adam_eps, weight_decay=weight_decay, **settings
        )
