"""RMNP: row-momentum-normalised preconditioning, Muon without its iterations (arXiv 2603.20527).

For a weight W (m, n), with G its gradient:

    M <- μ M + (1-μ) G,  U = (1-μ) G + μ M                                    (m, n)   optim/rules/momentum.py
    U_i <- U_i / max(‖U_i‖, 1e-12), for each row i                            (m, n)   optim/rules/lengths.py
    W <- W (1 - lr weight_decay) - lr √max(1, m / n) U

as in the code of the paper's LLaMA runs. The paper's algorithm has U = M (`--nesterov False`), and no factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peft_pretraining.methods._matrices.method import MatrixTraining
from peft_pretraining.optim import Batches, Direction, MatrixOptimizer, ParamUpdate, Phases
from peft_pretraining.optim.rules.lengths import over_lengths
from peft_pretraining.optim.rules.momentum import MomentumRule
from peft_pretraining.optim.tensors.collectives import together


class RmnpTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        return {"rule": RmnpRule(self.config.method.matrix_momentum, self.config.method.nesterov)}


class RmnpRule(MomentumRule):
    """The momentum, each row divided by its length. Nothing crosses devices that divide matrices by rows."""

    name = "rmnp"
    masks = True

    def __init__(self, momentum: float = 0.95, nesterov: bool = True, row_eps: float = 1e-12):
        super().__init__(momentum, nesterov)
        self._row_eps = row_eps

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        batches = Batches(updates)
        made = yield from together([over_lengths(each, 1, self.followed, self._divisor) for each in batches])
        for batch, direction in zip(batches, made, strict=True):
            m, n = batch.shard.shape
            batches.answer(batch, direction, batch.updates[0].rate * math.sqrt(max(1.0, m / n)))
        return batches.directions()

    def _divisor(self, norms: Tensor) -> Tensor:
        return norms.clamp(min=self._row_eps)


class RMNP(MatrixOptimizer):
    """RMNP for other loops: matrices as above, everything else by AdamW.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(4, 6))
    >>> optimizer = RMNP([weight], lr=0.01)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'exp_avg': (4, 6)}

    `betas` and `eps` are AdamW's.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 5e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        row_eps: float = 1e-12,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.1,
        **settings: Any,
    ):
        matrices = {"rule": RmnpRule(momentum, nesterov, row_eps)}
        super().__init__(params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
