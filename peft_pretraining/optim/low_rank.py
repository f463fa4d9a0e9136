"""The one optimizer for projected gradients: basis rules and an update rule, combined."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from peft_pretraining.distributed.sharding import ShardInfo, local, whole_norm
from peft_pretraining.optim.base import grad_of, gradient_of
from peft_pretraining.optim.collectives import run
from peft_pretraining.optim.model_groups import TARGET_MODULES, model_groups
from peft_pretraining.optim.moving import Member, move
from peft_pretraining.optim.param_update import ParamUpdate
from peft_pretraining.optim.settings import check_numbers, check_whole
from peft_pretraining.optim.slots import update_rule
from peft_pretraining.optim.state_tensor import is_counter
from peft_pretraining.optim.subspace import Arrival, Projected, project_gradients
from peft_pretraining.optim.subspace_state import GROUP_DEFAULTS, SubspaceOptimizer
from peft_pretraining.optim.update_rule import UpdateRule

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
        full_norm: bool = False,
        refresh_accumulation: int = 1,
    ):
        check_whole("refresh_accumulation", refresh_accumulation)
        self.full_norm, self.refresh_accumulation = full_norm, refresh_accumulation
        self._begin(update_rule(rule))
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

    # Gradients, between the backward pass and `step`.

    def begin_update(self, step: int, frozen: bool = False) -> None:
        self.update_step = step
        self.refresh_metrics = {}
        self._forget()
        for follower in self._followers:
            follower.begin(frozen)

    def begin_micro_batch(self, index: int, count: int) -> None:
        for follower in self._followers:
            follower.begin_micro_batch(index, count)

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

    def wants_extra_batches(self) -> int:
        further = self.refresh_accumulation - 1
        return further if further and self.some_refresh_reads_gradients() else 0

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Let refreshes that are due see these gradients, too: their SVD is of the mean over all that were observed and
        the update's own (large-batch GaLore, arXiv 2410.11289, section 5). The update itself does not see them."""
        for param, group in self._with_gradients():
            subspace = self.subspaces.get(param)
            if subspace and subspace.refresh_reads_gradient(self.state[param], group, self.step_of(param)):
                subspace.observe(gradient_of(param))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project every gradient that is not projected yet or has changed since, refreshing bases that are due. Nothing
        is stored."""
        params, arrivals = [], []
        for param, group in self._with_gradients():
            waiting, subspace = self.projected.get(param), self.subspaces.get(param)
            if subspace is None or (waiting and waiting.is_of(grad_of(param))):
                continue
            params.append(param)
            state, grad = self.local_state(param), gradient_of(param)
            arrivals.append(Arrival(subspace, state, grad, group, self.step_of(param)))
        for param, projected in zip(params, run(project_gradients(arrivals)), strict=True):
            waiting, grad = self.projected.get(param), grad_of(param)
            projected.look_at(grad)
            if waiting and waiting.source is grad:  # further passes into the same tensor, or a change of it
                projected.scale(waiting.scaled_by)
            self.projected[param] = projected

    def gradients(self) -> list[Tensor]:
        """The gradients as this optimizer sees them: R of the projected weights, the full gradient of the others, this
        device's parts."""
        self.project_gradients()
        return [
            self.projected[param].low_rank_grad if param in self.subspaces else gradient_of(param)
            for param, _ in self._with_gradients()
        ]

    def grad_norm(self) -> Tensor:
        """Global 2-norm, over all devices, of `gradients`; of the full gradients with `full_norm`, and of those whose
        lift reads them; a scalar. With per-layer updates it is that of the update's gradients before clipping."""
        for follower in self._followers:
            return follower.grad_norm()
        if self.full_norm:
            self.project_gradients()
            return super().grad_norm()
        return whole_norm(self._gradient_parts())

    def _gradient_parts(self) -> list[tuple[Tensor, ShardInfo]]:
        parts = []
        for (param, _), gradient in zip(self._with_gradients(), self.gradients(), strict=True):
            slot = self._slots[param]
            if slot.objects.lift.reads_gradient:
                parts.append((gradient_of(param), slot.shard))
            else:
                parts.append((gradient, slot.low_rank_shard))
        return parts

    def scale_(self, factor: Tensor) -> None:
        """Multiplies `gradients()` by a scalar, in place, and the full gradients that lifts read.

        Per-layer updates have clipped each gradient by itself, and are left alone.
        """
        if self._followers:
            return
        gradients = self.gradients()
        read = {param for param in self.projected if self._slots[param].objects.lift.reads_gradient}
        if gradients:
            torch._foreach_mul_(gradients + [gradient_of(param) for param in read], factor)
        for param, projected in self.projected.items():
            if param in read:
                projected.look_at(grad_of(param))  # both were scaled
            else:
                projected.scaled_by = projected.scaled_by * factor

    scale_gradients = scale_  # until the methods call it by its new name

    def metrics(self) -> dict[str, float]:
        """Means and smallest values of captured energy and overlap over the layers that the last update refreshed."""
        metrics, self.refresh_metrics = summary(self.refresh_metrics), {}
        return metrics

    # The update.

    # As torch's own: the compiler steps aside here instead of looking into decompositions and counters.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Attributes `found_inf` and `grad_scale` (scalars on the device), where somebody has set them, are honoured as by
        torch's fused optimizers: an update with `found_inf` leaves no trace, and gradients are divided by `grad_scale`.
        Rules that move weights themselves do so without reading them back.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for follower in self._followers:
            follower.finish()
        if self.update_step is None:
            self.refresh_metrics = {}
        moving = list(self._with_gradients())
        if all(self.objects(param).rule.moves_weights for param, _ in moving):
            self._move_on_the_device(moving)
        elif self._takes_place():
            move([self._member(param, group, gradient_of(param)) for param, group in moving], self.refresh_metrics)
        self._forget()
        return loss

    def _move_on_the_device(self, moving: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """An update by rules that look at `found_inf` themselves; where nobody has said which it is, gradients that are
        not finite leave it out as well."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None and self.update_step is None and moving:
            found_inf = (~wide_norm(self._gradient_parts()).isfinite()).float()
        members = [self._member(param, group, gradient_of(param)) for param, group in moving]
        move(members, self.refresh_metrics, found_inf, getattr(self, "grad_scale", None))

    def _takes_place(self) -> bool:
        """Whether the update is not to be left out; its gradients are projected, and divided by `grad_scale`."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            return False
        if grad_scale is not None:
            self.scale_(1 / grad_scale)
        self.project_gradients()
        if self.update_step is not None or wide_norm(self._gradient_parts()).isfinite():
            return True
        log.warning("skipped an update: a gradient is not finite")
        return False

    def _member(self, param: Tensor, group: dict[str, Any], grad: Tensor | None) -> Member:
        """A parameter that is to move by a gradient, or by the projected one that waits for it."""
        slot, state, projected = self._slots[param], self.local_state(param), self.projected.get(param)
        objects, counted = slot.objects, is_counter(state["step"])
        step = self.step_of(param) if counted or self.update_step is not None else -1
        if projected is None:
            assert grad is not None
            low_rank_grad = grad.to(slot.dtype)
        else:
            low_rank_grad = projected.low_rank_grad
        rate = float(group["lr"]) if counted else math.nan
        update = ParamUpdate(
            name=slot.name,
            index=slot.index,
            weight=local(param.detach()),
            low_rank_grad=low_rank_grad,
            state=state,
            step=step,
            rate=rate,
            grad=grad.to(slot.dtype) if objects.reads_gradient and grad is not None else None,
            shard=slot.shard,
            low_rank_shard=slot.low_rank_shard,
            projection=slot.projection,
            scale=group["scale"] if slot.subspace else 1.0,
            decay=rate * group["weight_decay"] if group["weight_decay"] else 0.0,
            decays_first=objects.rule.decays_first,
            rounds_once=objects.state_format == "float32",
            scaled_by=projected.scaled_by if projected else 1.0,
        )
        return Member(param, slot, update, self.state[param], group, projected)

    @torch.no_grad()
    def update(self, param: Tensor, grad: Tensor | None, group: dict[str, Any], projected: Projected | None) -> None:
        """Move one parameter at once. `projected` is its gradient after `project` and whatever scaling since, or None
        for a parameter without a projection; `grad` (m, n) is the full gradient, where the parameter's objects read
        it."""
        if projected is not None:
            self.projected[param] = projected
        move([self._member(param, group, grad)], self.refresh_metrics)
        self.projected.pop(param, None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, projected ones included: a refresh that was not stored stays due. What was observed
        for this update stays, too."""
        self.projected.clear()
        super().zero_grad(set_to_none)


def summary(refreshes: dict[str, list[Tensor]]) -> dict[str, float]:
    """Mean and smallest captured energy and overlap over the layers that an update refreshed; failures counted."""
    metrics: dict[str, float] = {}
    for name in ("captured_energy", "basis_overlap"):
        if values := refreshes.get(name):
            stacked = torch.stack([value.float() for value in values])
            metrics[f"{name}_mean"], metrics[f"{name}_min"] = stacked.mean().item(), stacked.min().item()
    if "refreshed" in refreshes:
        metrics["refreshed_layers"] = len(refreshes["refreshed"])
    if "failed_refreshes" in refreshes:
        metrics["failed_refreshes"] = len(refreshes["failed_refreshes"])
    return metrics


def wide_norm(parts: Sequence[tuple[Tensor, ShardInfo]]) -> Tensor:
    """`whole_norm`, in float64 where it overflowed: then it is finite if every number is."""
    norm = whole_norm(parts)
    return norm if norm.isfinite() else whole_norm([(part.double(), shard) for part, shard in parts])
