"""What an update does to each layer: how far its weight moved, in how many directions, and what its gradient was.

Beside the run: weights are copied before the step of every N-th update and compared after it. Nothing is drawn or
changed, so that a run with it is, bit by bit, the run without.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.distributed.gathering import whole
from peft_pretraining.distributed.sharding import local, total_norm

_POWER_ITERATIONS = 20


class LayerLog:
    """Looks at the updates 0, `every`, 2 `every` ... (0-based) of the trained matrices; 0: at none.

    Needs a copy of these weights on the device meanwhile. All ranks compute it together.
    """

    def __init__(self, every: int, model: nn.Module, optimizer: Optimizer, state: TrainState):
        self._every, self._state = every, state
        self._before: dict[str, Tensor] = {}
        self._found: dict[int, dict[str, dict[str, Tensor]]] = {}
        self._matrices = {name: param for name, param in model.named_parameters() if param.ndim > 1}
        if every:
            optimizer.register_step_pre_hook(self._look_before)
            optimizer.register_step_post_hook(self._look_after)

    def of(self, step: int) -> dict[str, Any]:
        """For the record of 0-based update `step`: {"layers": {parameter: {what: number}}}, or nothing."""
        found = self._found.pop(step, None)
        if not found:
            return {}
        numbers = {name: {what: float(value) for what, value in of.items()} for name, of in found.items()}
        finite = {name: {w: v for w, v in of.items() if math.isfinite(v)} for name, of in numbers.items()}
        return {"layers": finite}

    @property
    def _step(self) -> int:
        return self._state.update_step - 1  # the loop has counted the update already

    @torch.no_grad()
    def _look_before(self, optimizer: Optimizer, *_: Any) -> None:
        if self._step % self._every:
            return
        found = self._found[self._step] = {}
        projected = getattr(optimizer, "projected", {})
        for name, param in self._matrices.items():
            if not param.requires_grad:
                continue
            self._before[name] = param.detach().clone()
            found[name] = {} if param.grad is None else {"grad_norm": total_norm([param.grad])}
            of_projection = projected.get(param)
            if of_projection is not None and local(param) is param:  # of a sharded weight each device has its own part
                found[name]["projected_grad_norm"] = total_norm([of_projection.low_rank_grad])
            if of_projection is not None and of_projection.energy is not None:
                found[name]["captured_energy"] = of_projection.energy.clone()

    @torch.no_grad()
    def _look_after(self, *_: Any) -> None:
        for name, before in self._before.items():
            moved = self._matrices[name].detach().float() - before.float()
            self._found[self._step][name] |= {
                "update_ratio": total_norm([moved]) / total_norm([before]),
                "update_stable_rank": stable_rank(whole(moved)),
            }
        self._before.clear()


def stable_rank(matrix: Tensor) -> Tensor:
    """‖M‖_F² / ‖M‖₂² of a matrix (m, n), a scalar between 1 and its rank; NaN of zeros.

    The spectral norm is a power iteration's, from the longest row: close to it from below.
    """
    matrix = matrix.flatten(1)
    vector = matrix[torch.linalg.vector_norm(matrix, dim=1).argmax()]
    for _ in range(_POWER_ITERATIONS):
        vector = torch.nn.functional.normalize(vector, dim=0, eps=1e-30)
        vector = matrix.T @ (matrix @ vector)
    return matrix.square().sum() / torch.linalg.vector_norm(vector)  # ‖MᵀM v‖ of a unit v goes to ‖M‖₂²
