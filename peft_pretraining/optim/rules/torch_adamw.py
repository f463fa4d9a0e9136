"""torch's fused AdamW, for weights that are trained as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from peft_pretraining.optim.rules.adamw import AdamW
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.param_update import ParamUpdate


class TorchAdamW(AdamW):
    """torch's fused AdamW bit for bit, its count of updates on the parameter's device: for weights that are trained as
    they are. Nothing is read back from the device, and `found_inf` leaves an update out without a look at it."""

    moves_weights = True
    decays_first = True
    name = "torch_adamw"

    def __init__(self) -> None:
        super().__init__(torch_epsilon=True)

    def in_format(self, state_format: str) -> UpdateRule:
        """torch's kernel wants states in the weight's dtype: where they are not, float32 copies of rows are moved."""
        from peft_pretraining.optim.rules.wide_adamw import WideTorchAdamW

        return WideTorchAdamW() if state_format in ("float32", "weight") else super().in_format(state_format)

    def new_step(self, param: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=param.device)

    def move(
        self,
        updates: Sequence[ParamUpdate],
        group: dict[str, Any],
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        self._fused(
            [update.weight for update in updates],
            [update.low_rank_grad for update in updates],
            [update.state["exp_avg"] for update in updates],
            [update.state["exp_avg_sq"] for update in updates],
            [update.state["step"] for update in updates],
            group,
            found_inf,
            grad_scale,
        )

    def _fused(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        steps: list[Tensor],
        group: dict[str, Any],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        """torch's kernel, for lists of tensors of one dtype each."""
        own = {**group, "betas": group["betas"] or self.betas}
        torch_step(weights, grads, first, second, steps, own, found_inf, grad_scale)


def torch_step(
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """An update by torch's fused AdamW, which counts it, for lists of tensors of one dtype each."""
    beta1, beta2 = group["betas"]
    adamw(
        weights,
        grads,
        first,
        second,
        [],
        steps,
        fused=True,
        grad_scale=grad_scale,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
