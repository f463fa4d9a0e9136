"""The one optimizer for projected gradients: a basis rule and an update rule, combined."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.optim.bases import Bases, SVDBasis
from peft_pretraining.optim.update_rules import UPDATE_RULES


@dataclass
class _Staged:
    """A projected gradient waiting for `step`, and the bases it was projected with if they are new."""

    low_rank_grad: Tensor
    new_bases: Bases | None
    at_step: int


class LowRankOptimizer(torch.optim.Optimizer):
    """Updates some weights through low-rank projections of their gradients and the others as usual.

        opt = LowRankOptimizer([{"params": regular},
                                {"params": projected, "rank": 128, "update_proj_gap": 200, "scale": 0.25,
                                 "proj_type": "std"}], rule="adamw", lr=0.01, weight_decay=0.01)

    A group with a `rank` is projected; its parameters must be matrices. `update_proj_gap` counts updates between two
    refreshes of the basis (0 keeps the first), `scale` multiplies the projected update. Source: GaLore,
    arXiv 2403.03507, algorithm 2.

    A step has two parts. `project_gradients` refreshes the bases that are due and projects, but commits nothing:
    clipping can look at the projected gradients, and an update that is skipped leaves no trace and the refresh
    pending. `step` commits the bases and moves the weights; it projects what was not projected before, so calling it
    alone is enough.

    `update_step` is the training loop's 0-based update number, by which refreshes fall due. It may be left at None:
    then each parameter counts its own updates.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        rule: str = "adamw",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        if rule not in UPDATE_RULES:
            raise ValueError(f"rule must be one of {', '.join(UPDATE_RULES)}, got {rule!r}")
        self._rule = UPDATE_RULES[rule]()
        self._bases: dict[Tensor, SVDBasis] = {}
        self._staged: dict[Tensor, _Staged] = {}
        self.update_step: int | None = None
        defaults = {
            **{"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            **{"rank": None, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"},
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its state at once: a checkpoint loads into tensors that exist."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            state = self.state[param]
            state["step"] = torch.zeros((), dtype=torch.int64)
            like = param
            if group["rank"] is not None:
                if param.ndim != 2:
                    raise ValueError(f"a projected parameter must be a matrix, got shape {tuple(param.shape)}")
                basis = SVDBasis.for_weight(group["proj_type"], group["rank"], param.shape)
                basis.init_state(state, param)
                state["last_refresh"] = torch.full((), -1, dtype=torch.int64)
                self._bases[param] = basis
                like = param.new_empty(basis.low_rank_shape(param.shape))
            self._rule.init_state(state, like.detach())

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project every gradient that is not projected yet, refreshing bases that are due. Nothing is committed.

        A gradient with a NaN or an infinity never reaches the SVD, which would not return: it is projected with the old
        basis, stays non-finite, and its refresh stays due.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param in self._bases and param.grad is not None and param not in self._staged:
                    self._staged[param] = self._project(param, group)

    def _project(self, param: Tensor, group: dict[str, Any]) -> _Staged:
        state, basis = self.state[param], self._bases[param]
        step = int(state["step"]) if self.update_step is None else self.update_step
        bases, new = basis.bases(state), None
        if _refresh_is_due(step, int(state["last_refresh"]), group["update_proj_gap"]) and param.grad.isfinite().all():
            bases = new = basis.refreshed(bases, param.grad, first=int(state["last_refresh"]) < 0)
        return _Staged(basis.down(bases, param.grad), new, step)

    def gradients(self) -> list[Tensor]:
        """The gradients as this optimizer sees them, for norms and scaling in place: R of the projected weights, the
        full gradient of the others. Call `project_gradients` first."""
        params = (param for group in self.param_groups for param in group["params"] if param.grad is not None)
        return [self._staged[param].low_rank_grad if param in self._bases else param.grad for param in params]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.project_gradients()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        self._staged.clear()
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        state["step"] += 1
        if param in self._bases:
            basis, staged = self._bases[param], self._staged[param]
            bases = basis.bases(state)
            if staged.new_bases is not None:
                for side, new in staged.new_bases.items():
                    bases[side].copy_(new)
                state["last_refresh"].fill_(staged.at_step)
            direction, factor = self._rule.direction(state, staged.low_rank_grad, group)
            basis.add_back(param, bases, direction, -factor * group["scale"])
        else:
            direction, factor = self._rule.direction(state, param.grad, group)
            param.add_(direction, alpha=-factor)
        if group["weight_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])  # after the update, and not scaled

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, projected ones included: a refresh that was not committed stays due."""
        self._staged.clear()
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch would cast integers, too, to the parameter's."""
        dtypes = {param: {key: value.dtype for key, value in state.items()} for param, state in self.state.items()}
        super().load_state_dict(state_dict)
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, param in zip(saved_group["params"], group["params"], strict=True):
                for key, saved in state_dict["state"][index].items():
                    device = "cpu" if key in ("step", "last_refresh") else param.device
                    self.state[param][key] = saved.detach().clone().to(device, dtypes[param].get(key, saved.dtype))


def _refresh_is_due(step: int, last_refresh: int, gap: int) -> bool:
    """At every multiple of the gap, or at the first update after one at which the refresh could not be made."""
    if last_refresh < 0:
        return True
    return gap > 0 and step // gap > last_refresh // gap
