"""The one optimizer for projected gradients: basis rules and an update rule, combined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import ShardInfo, local, whole_norm
from peft_pretraining.optim.model_groups import TARGET_MODULES, model_groups
from peft_pretraining.optim.projection import Projection
from peft_pretraining.optim.settings import check_numbers
from peft_pretraining.optim.subspace import Projected
from peft_pretraining.optim.subspace_state import GROUP_DEFAULTS, SubspaceOptimizer
from peft_pretraining.optim.update_rules import UPDATE_RULES, UpdateRule

log = logging.getLogger("peft_pretraining")


class LowRankOptimizer(SubspaceOptimizer):
    """Updates some weights through low-rank projections of their gradients and the others as usual.

        >>> weight, bias = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6))
        >>> groups = [{"params": [bias]}, {"params": [weight], "rank": 2, "update_proj_gap": 200, "scale": 0.25}]
        >>> optimizer = LowRankOptimizer(groups, rule="adamw", lr=0.01, weight_decay=0.01)
        >>> (torch.ones(3, 4) @ weight.T + bias - 1).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
        {'right_basis': (2, 4), 'exp_avg': (6, 2), 'exp_avg_sq': (6, 2)}

    A group with a `rank` is projected; its parameters must be matrices. `update_proj_gap` counts updates between two
    refreshes of the basis (0 keeps the first), `scale` multiplies the projected update, `proj_type` is one of
    `bases.PROJECTION_TYPES`. `rand_ratio` (with `num_training_steps`) makes it GoLore, and `stagger_refresh` spreads
    the refreshes of a group's weights over the gap. Sources: GaLore, arXiv 2403.03507, algorithm 2; GoLore, arXiv
    2410.11289; Online Subspace Descent, arXiv 2408.12857.

    `rule` is one of adamw, adamw8bit, adafactor, lion, sgd, for projected and other parameters alike. `betas` belong to
    AdamW (0.9, 0.999) and Lion (0.9, 0.99), `eps` to AdamW (added before the bias correction), `beta1` to Adafactor,
    `momentum` and `dampening` to SGD; a scheduler that cycles momentum cycles `betas` or `momentum`. `svd_method` is
    gram, exact or randomized. Random bases are functions of (seed, parameter's name, refresh number): pass named
    parameters, or the names are positions.

    A step has two parts. `project_gradients` refreshes the bases that are due and projects, but commits nothing:
    clipping can look at the projected gradients, and an update that is skipped leaves no trace and the refresh
    pending. `step` commits the bases and moves the weights; called alone it does both.

    `begin_update` tells the training loop's 0-based update number, by which refreshes fall due, and leaves it to the
    loop to skip updates with gradients that are not finite. Without it each parameter counts its own updates, and
    `step` skips such an update itself, with a warning.

    State is on its weight's device, wherever `model.to` takes that, and in the dtype that the weight had at
    construction. Settings and groups that make no sense raise `ValueError`, and leave nothing behind.
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
        if not isinstance(rule, UpdateRule) and rule not in UPDATE_RULES:
            raise ValueError(f"rule must be one of {', '.join(UPDATE_RULES)}, got {rule!r}")
        self._begin(rule if isinstance(rule, UpdateRule) else UPDATE_RULES[rule]())
        own = {"lr": lr, "betas": betas, "eps": eps, "beta1": beta1, "momentum": momentum, "dampening": dampening}
        shared = {"weight_decay": weight_decay, "svd_method": svd_method, "seed": seed, "rule": self.rule.name}
        check_numbers({**own, **shared})
        if self.rule.betas is None:
            del own["betas"]  # so that schedulers which cycle momentum look for `momentum`
        elif betas is None:
            own["betas"] = self.rule.betas
        super().__init__(params, {**own, **shared, **GROUP_DEFAULTS})

    @classmethod
    def from_model(
        cls, model: nn.Module, *, rank: int, target_modules: Sequence[str] = TARGET_MODULES, **settings: Any
    ) -> LowRankOptimizer:
        """An optimizer that projects a model's linear layers in attention and MLPs, as pre-training does.

            >>> from torch import nn
            >>> model = nn.ModuleDict({"mlp": nn.Linear(8, 16), "head": nn.Linear(16, 2)})
            >>> optimizer = LowRankOptimizer.from_model(model, rank=4, scale=0.25, rule="adamw", lr=0.01)
            >>> [(group["param_names"], group["rank"]) for group in optimizer.param_groups]
            [(['mlp.bias', 'head.weight', 'head.bias'], None), (['mlp.weight'], 4)]

        `target_modules`: the weights of linear layers whose dotted name contains one of these are projected; all other
        parameters that are trained are updated as they are. `settings`: those of the projected group
        (`update_proj_gap`, `scale`, `proj_type`, `rand_ratio`, ...) and those of the constructor. Raises `ValueError`
        if no layer has such a name.
        """
        projection = {name: settings.pop(name) for name in GROUP_DEFAULTS if name in settings}
        return cls(model_groups(model, target_modules, {"rank": rank, **projection}), **settings)

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
        """Project every gradient that is not projected yet or has changed since, refreshing bases that are due. Nothing
        is committed."""
        for param, group in self._with_gradients():
            waiting = self.projected.get(param)
            if param not in self.subspaces or (waiting and waiting.is_of(param.grad)):
                continue
            state, grad = self.local_state(param), local(param.grad)
            projected = self.subspaces[param].project(state, grad, group, self.step_of(param))
            projected.look_at(param.grad)
            if waiting and waiting.source is param.grad:  # further passes into the same tensor, or a change of it
                projected.scale(waiting.scaled_by)
            self.projected[param] = projected

    def gradients(self) -> list[Tensor]:
        """The gradients as this optimizer sees them: R of the projected weights, the full gradient of the others, this
        device's parts."""
        self.project_gradients()
        return [
            self.projected[param].low_rank_grad if param in self.subspaces else local(param.grad)
            for param, _ in self._with_gradients()
        ]

    def grad_norm(self) -> Tensor:
        """Global 2-norm of `gradients`, over all devices; a scalar."""
        return whole_norm(self._gradient_parts())

    def _gradient_parts(self) -> list[tuple[Tensor, ShardInfo]]:
        shards = [self._shards[param] for param, _ in self._with_gradients()]
        return list(zip(self.gradients(), shards, strict=True))

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply `gradients()` by a scalar, in place."""
        gradients = self.gradients()
        if gradients:
            torch._foreach_mul_(gradients, factor)
        for projected in self.projected.values():
            projected.scaled_by = projected.scaled_by * factor

    # As torch's own: the compiler steps aside here instead of looking into decompositions and counters.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for follower in self._followers:
            follower.finish()
        if self.update_step is None:
            self.refresh_metrics = {}
        self.project_gradients()
        if self.update_step is not None or self._gradients_are_finite():
            for param, group in self._with_gradients():
                self.update(param, local(param.grad), group, self.projected.get(param))
        self._forget()
        return loss

    def _gradients_are_finite(self) -> bool:
        if wide_norm(self._gradient_parts()).isfinite():
            return True
        log.warning("skipped an update: a gradient is not finite")
        return False

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        projected: Projected | None,
    ) -> None:
        """Move one parameter. `projected` is its gradient after `project` and whatever scaling since, or None for a
        parameter without a projection; `grad` (m, n) is the full gradient, which only online PCA reads then."""
        state, rate, step = self.local_state(param), float(group["lr"]), self.step_of(param)
        state["step"] += 1
        weight, subspace = local(param), self.subspaces.get(param)
        if subspace:
            subspace.commit(state, projected, step, self.rule, self.refresh_metrics)
        projection = subspace.rule.projection if subspace else Projection()
        bases = projection.bases(state)
        dtype = self._dtypes[param]
        low_rank_grad = projected.low_rank_grad if projected else grad.to(dtype)
        direction, factor = self.rule.direction(state, low_rank_grad, group, self._shards[param])
        self._keep_new(param, state, self.state[param])
        if group["weight_decay"] and self.rule.decays_first:
            weight.mul_(1 - rate * group["weight_decay"])
        if self.rule.acts_in_full_space:
            weight.add_(self.rule.finish(projection.up(bases, direction)), alpha=-factor)  # a sign, whatever the scale
        else:
            projection.add_back(weight, bases, direction, -factor * (group["scale"] if subspace else 1.0))
        if subspace and not subspace.rule.refreshes and not projected.changes_bases and int(state["refreshes"]):
            pace = rate / _base_rate(group, rate) / group["update_proj_gap"] if rate else 0.0
            subspace.rule.advance(state, grad.to(dtype), low_rank_grad, projected.scaled_by, pace)
        if group["weight_decay"] and not self.rule.decays_first:
            weight.mul_(1 - rate * group["weight_decay"])  # after the update, and not scaled

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, projected ones included: a refresh that was not committed stays due. What was observed
        for this update stays, too."""
        self.projected.clear()
        super().zero_grad(set_to_none)


def wide_norm(parts: Sequence[tuple[Tensor, ShardInfo]]) -> Tensor:
    """`whole_norm`, in float64 where it overflowed: then it is finite if every number is."""
    norm = whole_norm(parts)
    return norm if norm.isfinite() else whole_norm([(part.double(), shard) for part, shard in parts])


def _base_rate(group: dict[str, Any], rate: float) -> float:
    """What a rate is relative to: a scheduler's `initial_lr`, the rate at construction, or, with both 0 (a warm-up by
    hand), the largest so far."""
    if base := float(group.get("initial_lr", group["first_lr"])):
        return base
    group["largest_lr"] = max(group.get("largest_lr", 0.0), rate)
    return group["largest_lr"]
