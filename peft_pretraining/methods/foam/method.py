"""FOAM: Adam whose moments are those of blocks of neighbouring inputs (arXiv 2512.07112).

For a weight W (m, n), with F the means over blocks of 2^l entries of a row (the last block filled up with zeros), U
what repeats each of them, k the update counted from 1 and c_k = √(1-β2^k) / (1-β1^k):

    D = G - U(F(G))                                                            (m, n)
    M = β1 M + (1-β1) F(G),  V = β2 V + (1-β2) F(G²), or F(G)²                 (m, ⌈n/2^l⌉)
    W <- W - lr c_k α (U(M) + D) / (√(U(V) + D²) + ε)                          (m, n)

with α = scale. What a block's mean leaves out of the gradient, D, thus moves the weight at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods._matrices.method import MatrixTraining, adam_arguments
from peft_pretraining.methods.foam.folding import means, repeat, without_repeated
from peft_pretraining.methods.foam.settings import SECOND_MOMENTS
from peft_pretraining.optim import Batches, Direction, MatrixOptimizer, ParamUpdate, StateTensor, UpdateRule
from peft_pretraining.optim.rules.adamw import TorchStep
from peft_pretraining.optim.rules.batches import Part
from peft_pretraining.optim.tensors.param_update import Step


class FoamTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        return {"rule": FoldedAdam(method.foam_level, method.scale, method.foam_second), **adam_arguments(self.config)}


class FoldedAdam(UpdateRule):
    """Adam with moments of blocks of 2^`level` entries of a row, and D beside them. Nothing crosses devices that divide
    a matrix by rows."""

    name = "foam"
    masks = True
    betas = (0.9, 0.999)

    def __init__(self, level: int = 2, scale: float = 1.0, second: str = SECOND_MOMENTS[0]):
        if second not in SECOND_MOMENTS:
            raise ValueError(f"second must be one of {', '.join(SECOND_MOMENTS)}, got {second!r}")
        if level < 0:
            raise ValueError(f"level must be at least 0, got {level}")
        self._block, self._scale, self._of_squares = 2**level, scale, second == SECOND_MOMENTS[0]

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        if like.ndim != 2 or shard.dim == 1:
            how = "" if like.ndim != 2 else " divided by columns"
            raise ValueError(f"FOAM is for matrices, divided by rows if at all, got shape {tuple(like.shape)}{how}")
        folded = like.new_zeros(len(like), -(-like.shape[1] // self._block))
        return {key: StateTensor.like_gradient(folded.clone(), shard) for key in ("exp_avg", "exp_avg_sq")}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        beta1, beta2 = group["betas"]
        batches = Batches(updates)
        for batch in batches:
            correction = math.sqrt(1 - beta2**batch.k) / (1 - beta1**batch.k)
            factor = batch.updates[0].rate * self._scale * correction
            batches.answer(batch, partial(self._step, beta1=beta1, beta2=beta2, eps=group["eps"]), factor)
        return batches.directions()

    def _step(self, part: Part, beta1: float, beta2: float, eps: float) -> Step:
        """(U(M) + D) / (√(U(V) + D²) + ε), with both moments moved on.

        Which is a first update of AdamW with decays of 1/2 for D, where the moments before it are U(M) and U(V).
        """
        grad, first, second = part.grad, part.state("exp_avg"), part.state("exp_avg_sq")
        columns = grad.shape[-1]
        if columns % self._block:
            grad = functional.pad(grad, (0, -columns % self._block))
        mean = means(grad, self._block)
        first.lerp_(mean, 1 - beta1)
        second.lerp_(means(grad.square(), self._block) if self._of_squares else mean.square(), 1 - beta2)
        wide = without_repeated(grad, mean, self._block), repeat(first, self._block), repeat(second, self._block)
        detail, repeated_first, repeated_second = (each[..., :columns].contiguous() for each in wide)
        return TorchStep(detail, repeated_first, repeated_second, k=1, betas=(0.5, 0.5), eps=eps)


class Foam(MatrixOptimizer):
    """FOAM for other loops: matrices as above, everything else by AdamW at the same rate.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(6, 8))
    >>> optimizer = Foam([weight], lr=0.01, level=2)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'exp_avg': (6, 2), 'exp_avg_sq': (6, 2)}
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.01,
        level: int = 2,
        scale: float = 0.25,
        second: str = "mean_of_squares",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **settings: Any,
    ):
        matrices = {"rule": FoldedAdam(level, scale, second), "betas": betas}
        super().__init__(params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
