"""The one optimizer for projected gradients: basis rules and an update rule, combined."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from peft_pretraining.distributed import LowRankReduction
from peft_pretraining.distributed.sharding import local
from peft_pretraining.optim.basis.subspace import Projected
from peft_pretraining.optim.masked_updates import MaskedUpdates
from peft_pretraining.optim.model_groups import TARGET_MODULES, model_groups
from peft_pretraining.optim.moving import Member, move
from peft_pretraining.optim.projected_gradients import not_finite, wide_norm
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.state.base import gradient_of
from peft_pretraining.optim.state.settings import check_numbers, check_whole
from peft_pretraining.optim.state.slots import update_rule
from peft_pretraining.optim.state.subspace_state import GROUP_DEFAULTS
from peft_pretraining.optim.tensors.mask import Mask
from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.rounding import Noise
from peft_pretraining.optim.tensors.state_tensor import counts, is_counter

log = logging.getLogger("peft_pretraining")


class LowRankOptimizer(MaskedUpdates):
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

    Each group names the four objects that it is updated by, or gives them: `rule`, one of adamw, torch_adamw (its bits,
    for weights that are not projected), adamw8bit, adafactor, lion, sgd, and for groups that name none the
    constructor's; `basis`, one of `bases.BASES`, by default what `proj_type` and `rand_ratio` ask for; `lift`, one of
    identity, project_back, sign; `state_format`, one of `published` (everything in the weight's dtype), float32 (state
    and arithmetic, the weight rounded once an update), `weight` (as float32, but bases and first moments in the
    weight's dtype), 8bit. Classes of one's own derive from `UpdateRule`, `BasisRule` and `Lift`, and an object goes
    into the group in place of a name.

    `rounding` is how bfloat16 weights are rounded: nearest or stochastic, which is a function of the group's `seed`,
    the update and the parameter's name. `basis_dtype`, one of auto, float32, weight, int8, is how bases are kept.

    `betas` belong to AdamW (0.9, 0.999) and Lion (0.9, 0.99), `eps` to AdamW (added before the bias correction),
    `beta1` to Adafactor, `momentum` and `dampening` to SGD; a scheduler that cycles momentum cycles `betas` or
    `momentum`. `svd_method` is gram, exact or randomized. Random bases are functions of (seed, parameter's name,
    refresh number): pass named parameters, or the names are positions. `full_norm` lets `grad_norm` be that of whole
    gradients; `refresh_accumulation` is the number of total batches whose mean gradient a basis is taken from, of which
    `wants_extra_batches` asks for the further ones.

    A step has two parts. `project_gradients` refreshes the bases that are due and projects, but stores nothing:
    clipping can look at the projected gradients, and an update that is skipped leaves no trace and the refresh
    pending. `step` stores the bases and moves the weights; called alone it does both.

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
        if refresh_accumulation < 1:
            raise ValueError(f"refresh_accumulation must be at least 1, got {refresh_accumulation}")
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

    def low_rank_reduction(self) -> LowRankReduction | None:
        from peft_pretraining.optim.low_rank_gradients import LowRankGradients

        projected = [self.objects(param) for param in self.subspaces if not self._comes_projected(param)]
        if self.full_norm or all(objects.reads_gradient for objects in projected):
            return None
        return LowRankGradients(self)

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
        self.settle()
        for follower in self._followers:
            follower.finish()
        if self.update_step is None:
            self.refresh_metrics = {}
        moving = list(self._with_gradients())
        if all(self.objects(param).rule.moves_weights for param, _ in moving):
            self._move_on_the_device(moving)
        else:
            mask = self.mask_of(moving)
            if self._takes_place(mask):
                self._move(moving, mask=mask)
                self._unsettled = mask
        self._forget()
        return loss

    def _move_on_the_device(self, moving: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """An update by rules that look at `found_inf` themselves; where nobody has said which it is, gradients that are
        not finite leave it out as well."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None and self.update_step is None and moving:
            found_inf = not_finite(self._gradient_parts())
        self._move(moving, found_inf, getattr(self, "grad_scale", None))

    def _move(
        self,
        moving: Sequence[tuple[Tensor, dict[str, Any]]],
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        mask: Mask | None = None,
        grads: Mapping[Tensor, Tensor | None] | None = None,
    ) -> None:
        """Move parameters by their gradients, or by `grads`, projected ones by those that wait for them."""
        if grads is None:
            grads = {param: None if param.grad is None else gradient_of(param) for param, _ in moving}
        moving = self._alike_together(moving)
        counted = [param for param, _ in moving if is_counter(self.state[param]["step"])]
        known = dict(zip(counted, counts([self.state[param]["step"] for param in counted]), strict=True))
        members = (self._member(param, group, grads[param], mask, known.get(param)) for param, group in moving)
        move(members, self._lots([param for param, _ in moving]), self.refresh_metrics, found_inf, grad_scale)

    def _takes_place(self, mask: Mask | None) -> bool:
        """Whether the update is not to be left out, or is masked; its gradients are projected, and divided by
        `grad_scale`."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if mask is None and found_inf is not None and bool(found_inf):
            return False
        if grad_scale is not None:
            self.scale_(1 / grad_scale)
        self.project_gradients()
        if mask is not None or self.update_step is not None or wide_norm(self._gradient_parts()).isfinite():
            return True
        log.warning("skipped an update: a gradient is not finite")
        return False

    def _member(
        self,
        param: Tensor,
        group: dict[str, Any],
        grad: Tensor | None,
        mask: Mask | None = None,
        count: int | None = None,
    ) -> Member:
        """A parameter that is to move by a gradient, or by the projected one that waits for it. `count`: its updates
        before this one, where somebody has looked already."""
        slot, state, projected = self._slots[param], self.local_state(param), self.projected.get(param)
        objects, counted = slot.objects, is_counter(state["step"])
        if counted and count is None:
            count = int(state["step"])
        if self.update_step is not None:
            step = self.update_step
        elif counted or objects.rounds_stochastically:
            step = int(state["step"]) if count is None else count
        else:
            step = -1
        if projected is None:
            assert grad is not None
            low_rank_grad = grad if grad.dtype == slot.dtype or objects.rule.widens else grad.to(slot.dtype)
        else:
            low_rank_grad = projected.low_rank_grad
        rate = float(group["lr"]) if counted else math.nan
        update = ParamUpdate(
            name=slot.name,
            index=slot.index,
            owner=slot.owner,
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
            rounds_once=objects.rounds_once,
            noise=Noise(group["seed"], slot.name, step, slot.shard) if objects.rounds_stochastically else None,
            scaled_by=projected.scaled_by if projected else 1.0,
            mask=mask,
            count=None if count is None else count + 1,
        )
        return Member(param, slot, update, self.state[param], group, projected)

    @torch.no_grad()
    def update_together(
        self,
        moving: Sequence[tuple[Tensor, Tensor | None, dict[str, Any], Projected | None]],
        mask: Mask | None = None,
    ) -> None:
        """Move some parameters at once, each by its gradient after `project` and whatever scaling since (None: it is
        not projected) and by the full one (m, n), where there is no projection or its objects read it.

        `mask`: of parameters whose objects mask and which store no new bases. The caller settles it.
        """
        self.projected.update({param: projected for param, _, _, projected in moving if projected is not None})
        grads = {param: grad for param, grad, _, _ in moving}
        self._move([(param, group) for param, _, group, _ in moving], mask=mask, grads=grads)
        for param in grads:
            self.projected.pop(param, None)

    def update(self, param: Tensor, grad: Tensor | None, group: dict[str, Any], projected: Projected | None) -> None:
        """`update_together` for one parameter."""
        self.update_together([(param, grad, group, projected)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, projected ones included: a refresh that was not stored stays due. What was observed
        for this update stays, too."""
        self.projected.clear()
        if self.backward is not None:
            self.backward.drop()
        super().zero_grad(set_to_none)
