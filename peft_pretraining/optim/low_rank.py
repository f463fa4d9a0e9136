"""The one optimizer for projected gradients: basis rules and an update rule, combined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import Shard, distribute_like, local, whole_norm
from peft_pretraining.optim.bases import BasisRule, basis_rule
from peft_pretraining.optim.projection import Projection
from peft_pretraining.optim.subspace import Projected, Subspace, counter
from peft_pretraining.optim.update_rules import UPDATE_RULES, UpdateRule

log = logging.getLogger("peft_pretraining")

_ATTRIBUTES = ("rule", "update_step", "subspaces", "refresh_metrics", "projected", "_peers", "_shards", "_scaled_by")
"""What a copy of the optimizer takes along, besides groups and state."""

_GROUP_DEFAULTS = {
    **{"rank": None, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"},
    **{"rand_ratio": None, "num_training_steps": None, "stagger_refresh": False},
}


class LowRankOptimizer(torch.optim.Optimizer):
    """Updates some weights through low-rank projections of their gradients and the others as usual.

        opt = LowRankOptimizer([{"params": regular},
                                {"params": projected, "rank": 128, "update_proj_gap": 200, "scale": 0.25,
                                 "proj_type": "std"}], rule="adamw", lr=0.01, weight_decay=0.01)

    A group with a `rank` is projected; its parameters must be matrices. `update_proj_gap` counts updates between two
    refreshes of the basis (0 keeps the first), `scale` multiplies the projected update, `proj_type` is one of
    `bases.PROJECTION_TYPES`. `rand_ratio` (with `num_training_steps`) makes it GoLore, and `stagger_refresh` spreads
    the refreshes of a group's weights over the gap. Sources: GaLore, arXiv 2403.03507, algorithm 2; GoLore, arXiv
    2410.11289; Online Subspace Descent, arXiv 2408.12857.

    `rule` is one of adamw, adamw8bit, adafactor, lion, sgd, for projected and other parameters alike. `betas` belong to
    AdamW (0.9, 0.999) and Lion (0.9, 0.99), `eps` to AdamW (added before the bias correction), `beta1` to Adafactor,
    `momentum` and `dampening` to SGD. `svd_method` is gram, exact or randomized. Random bases are functions of (seed,
    parameter's name, refresh number): pass named parameters, or the names are positions.

    A step has two parts. `project_gradients` refreshes the bases that are due and projects, but commits nothing:
    clipping can look at the projected gradients, and an update that is skipped leaves no trace and the refresh
    pending. `step` commits the bases and moves the weights; called alone it does both.

    `begin_update` tells the training loop's 0-based update number, by which refreshes fall due, and leaves it to the
    loop to skip updates with gradients that are not finite. Without it each parameter counts its own updates, and
    `step` skips such an update itself, with a warning.
    """

    def __init__(
        self,
        params: Any,
        *,
        rule: str | UpdateRule = "adamw",
        lr: float = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-6,
        beta1: float | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        svd_method: str = "gram",
        seed: int = 0,
    ):
        if isinstance(rule, str) and rule not in UPDATE_RULES:
            raise ValueError(f"rule must be one of {', '.join(UPDATE_RULES)}, got {rule!r}")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.rule: UpdateRule = UPDATE_RULES[rule]() if isinstance(rule, str) else rule
        self.update_step: int | None = None
        self.subspaces: dict[Tensor, Subspace] = {}
        self.refresh_metrics: dict[str, list[Tensor]] = {}
        """Of the last update's refreshes, one number per weight: captured energy, overlap with the basis before."""
        self._peers: list[Subspace] = []
        self._shards: dict[Tensor, Shard] = {}  # of the gradients that the update rule sees
        self.projected: dict[Tensor, Projected] = {}
        """Gradients that wait for `step`."""
        self._scaled_by: Tensor | float = 1.0
        own = {"lr": lr, "betas": betas, "eps": eps, "beta1": beta1, "momentum": momentum, "dampening": dampening}
        shared = {"weight_decay": weight_decay, "svd_method": svd_method, "seed": seed}
        super().__init__(params, {**own, **shared, **_GROUP_DEFAULTS})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its state at once: a checkpoint loads into tensors that exist."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            # Online Subspace Descent's base rate, where no scheduler keeps an `initial_lr`.
            group.setdefault("first_lr", group["lr"])
            names = group.get("param_names") or [
                f"{len(self.param_groups) - 1}.{i}" for i in range(len(group["params"]))
            ]
            rules = [_basis_rule(param, name, group) for param, name in zip(group["params"], names, strict=True)]
        except ValueError:
            self.param_groups.pop()
            raise
        for param, name, rule in zip(group["params"], names, rules, strict=True):
            self._init_param(param, name, rule, group)

    def _init_param(self, param: Tensor, name: str, rule: BasisRule | None, group: dict[str, Any]) -> None:
        state: dict[str, Any] = {"step": counter(0)}
        like, shard = local(param.detach()), Shard.of(param)
        if rule:
            self.subspaces[param] = Subspace(rule, name, self._peers)
            self.subspaces[param].init_state(state, like)
            like = like.new_empty(rule.projection.low_rank_shape(like.shape))
            shard = rule.projection.low_rank_shard
        self._shards[param] = shard
        own: dict[str, Any] = {}
        self.rule.init_state(own, like, group, shard)
        for key, value in own.items():
            state[key] = distribute_like(value, param, *(self.rule.divided(key, shard) or (None, None)))
        self.state[param] = state

    def local_state(self, param: Tensor) -> dict[str, Any]:
        """A parameter's state as this device has it."""
        return {key: local(value) for key, value in self.state[param].items()}

    def begin_update(self, step: int) -> None:
        """Take `step` as the 0-based number of the update, and drop what a skipped one may have left."""
        self.update_step = step
        self.refresh_metrics = {}
        self._forget()

    def step_of(self, param: Tensor) -> int:
        """The 0-based update that a parameter is at."""
        return int(self.state[param]["step"]) if self.update_step is None else self.update_step

    def some_refresh_reads_gradients(self) -> bool:
        """Whether some basis will be taken from this update's gradient."""
        return any(
            self.subspaces[param].refresh_reads_gradient(self.state[param], group, self.step_of(param))
            for group in self.param_groups
            for param in group["params"]
            if param in self.subspaces
        )

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Let refreshes that are due see these gradients, too: their SVD is of the mean over all that were observed and
        the update's own (large-batch GaLore, arXiv 2410.11289, section 5). The update itself does not see them."""
        for param, group in self._with_gradients():
            subspace = self.subspaces.get(param)
            if subspace and subspace.refresh_reads_gradient(self.state[param], group, self.step_of(param)):
                subspace.observe(local(param.grad))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project every gradient that is not projected yet, refreshing bases that are due. Nothing is committed."""
        for param, group in self._with_gradients():
            if param in self.subspaces and param not in self.projected:
                self.projected[param] = self.subspaces[param].project(
                    self.state[param], local(param.grad), group, self.step_of(param)
                )

    def gradients(self) -> list[Tensor]:
        """The gradients as this optimizer sees them: R of the projected weights, the full gradient of the others, this
        device's parts. Call `project_gradients` first."""
        return [
            self.projected[param].low_rank_grad if param in self.subspaces else local(param.grad)
            for param, _ in self._with_gradients()
        ]

    def grad_norm(self) -> Tensor:
        """Global 2-norm of `gradients`, over all devices; a scalar."""
        shards = [self._shards[param] for param, _ in self._with_gradients()]
        return whole_norm(zip(self.gradients(), shards, strict=True))

    def shard_of(self, param: Tensor) -> Shard:
        """How the gradients that the update rule sees are divided."""
        return self._shards[param]

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply `gradients()` by a scalar, in place."""
        if gradients := self.gradients():
            torch._foreach_mul_(gradients, factor)
        self._scaled_by = self._scaled_by * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.update_step is None:
            self.refresh_metrics = {}
        self.project_gradients()
        if self.update_step is not None or self._gradients_are_finite():
            for param, group in self._with_gradients():
                self.update(param, local(param.grad), group, self.projected.get(param), self._scaled_by)
        self._forget()
        return loss

    def _gradients_are_finite(self) -> bool:
        if self.grad_norm().isfinite():
            return True
        log.warning("skipped an update: a gradient is not finite")
        return False

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        projected: Projected | None,
        scaled_by: Tensor | float = 1.0,
    ) -> None:
        """Move one parameter. `projected` is its gradient after `project` and whatever scaling (`scaled_by`) since, or
        None for a parameter without a projection; `grad` (m, n) is the full gradient, which only online PCA reads."""
        state, rate, step = self.local_state(param), float(group["lr"]), self.step_of(param)
        state["step"] += 1
        weight, subspace = local(param), self.subspaces.get(param)
        if subspace:
            subspace.commit(state, projected, step, self.rule, self.refresh_metrics)
        projection = subspace.rule.projection if subspace else Projection()
        bases = projection.bases(state)
        low_rank_grad = projected.low_rank_grad if projected else grad
        direction, factor = self.rule.direction(state, low_rank_grad, group, self._shards[param])
        if group["weight_decay"] and self.rule.decays_first:
            weight.mul_(1 - rate * group["weight_decay"])
        if self.rule.acts_in_full_space:
            weight.add_(self.rule.finish(projection.up(bases, direction)), alpha=-factor)  # a sign, whatever the scale
        else:
            projection.add_back(weight, bases, direction, -factor * (group["scale"] if subspace else 1.0))
        if subspace and not subspace.rule.refreshes and projected.new_bases is None and not projected.failed:
            base_rate = group.get("initial_lr", group["first_lr"])
            basis_rate = rate / base_rate / group["update_proj_gap"] if base_rate else 0.0
            subspace.rule.advance(state, grad.to(param.dtype), low_rank_grad, scaled_by, basis_rate)
        if group["weight_decay"] and not self.rule.decays_first:
            weight.mul_(1 - rate * group["weight_decay"])  # after the update, and not scaled

    def _with_gradients(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"] if p.grad is not None)

    def _forget(self) -> None:
        self.projected.clear()
        self._scaled_by = 1.0
        for subspace in self._peers:
            subspace.forget_observed()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, projected ones included: a refresh that was not committed stays due. What was observed
        for this update stays, too."""
        self.projected.clear()
        self._scaled_by = 1.0
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch would cast integers, too, to the parameter's. Raises
        `ValueError`, and loads nothing, for the state of another rank, projection or rule."""
        like = {param: dict(state) for param, state in self.state.items()}
        saved = {
            param: state_dict["state"].get(index, {})
            for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=False)
            for index, param in zip(saved_group["params"], group["params"], strict=False)
        }  # torch refuses other numbers of groups or parameters
        for param, state in saved.items():
            if (found := _shapes(state)) != (expected := _shapes(like[param])):
                raise ValueError(f"state of another rank, proj_type or rule: {found} instead of {expected}")
        super().load_state_dict(state_dict)
        for param, state in saved.items():
            for key, value in state.items():
                local(like[param][key]).copy_(local(value))
            self.state[param] = like[param]
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and `pickle`: torch's own would leave out what it does not know."""
        return super().__getstate__() | {name: getattr(self, name) for name in _ATTRIBUTES}


def _basis_rule(param: Tensor, name: str, group: dict[str, Any]) -> BasisRule | None:
    """The rule of a projected parameter, None for another."""
    if group["rank"] is None:
        return None
    if param.ndim != 2:
        raise ValueError(f"a projected parameter must be a matrix, got {name} of shape {tuple(param.shape)}")
    return basis_rule(group, Shard.of(param))


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}
