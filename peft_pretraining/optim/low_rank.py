"""The one optimizer for projected gradients: basis rules and an update rule, combined."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import Shard, distribute_like, local, whole_norm
from peft_pretraining.optim.base import InPlaceOptimizer, name_of, other_state
from peft_pretraining.optim.bases import BasisRule, basis_rule, check_names
from peft_pretraining.optim.model_groups import TARGET_MODULES, model_groups
from peft_pretraining.optim.projection import Projection
from peft_pretraining.optim.settings import check_keys, check_numbers, check_projection
from peft_pretraining.optim.subspace import Projected, Subspace, counter
from peft_pretraining.optim.update_rules import UPDATE_RULES, UpdateRule

log = logging.getLogger("peft_pretraining")

_ATTRIBUTES = ("rule", "update_step", "subspaces", "refresh_metrics", "projected", "_peers", "_shards", "_dtypes")
"""What a copy of the optimizer takes along, besides groups and state."""

_GROUP_DEFAULTS = {
    "rank": None,
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
    "rand_ratio": None,
    "num_training_steps": None,
    "stagger_refresh": False,
}


class Follower(Protocol):
    """Something that moves the optimizer's weights itself, inside the backward pass."""

    def attach(self) -> None:
        """The optimizer has new parameters or groups."""

    def finish(self) -> None:
        """The backward passes of an update are over."""


class LowRankOptimizer(InPlaceOptimizer):
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

    _on_cpu = frozenset({"step", "last_refresh", "refreshes", "basis_step"})

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
        self.rule: UpdateRule = rule if isinstance(rule, UpdateRule) else UPDATE_RULES[rule]()
        self.update_step: int | None = None
        self.subspaces: dict[Tensor, Subspace] = {}
        self.refresh_metrics: dict[str, list[Tensor]] = {}
        """Of the last update's refreshes, one number per weight: captured energy, overlap with the basis before."""
        self._peers: list[Subspace] = []
        self._shards: dict[Tensor, Shard] = {}  # of the gradients that the update rule sees
        self._dtypes: dict[Tensor, torch.dtype] = {}  # of these: the weights' at construction
        self.projected: dict[Tensor, Projected] = {}
        """Gradients that wait for `step`."""
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        own = {"lr": lr, "betas": betas, "eps": eps, "beta1": beta1, "momentum": momentum, "dampening": dampening}
        shared = {"weight_decay": weight_decay, "svd_method": svd_method, "seed": seed, "rule": self.rule.name}
        check_numbers({**own, **shared})
        if self.rule.betas is None:
            del own["betas"]  # so that schedulers which cycle momentum look for `momentum`
        elif betas is None:
            own["betas"] = self.rule.betas
        super().__init__(params, {**own, **shared, **_GROUP_DEFAULTS})

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
        projection = {name: settings.pop(name) for name in _GROUP_DEFAULTS if name in settings}
        return cls(model_groups(model, target_modules, {"rank": rank, **projection}), **settings)

    def _check_keys(self, given: Collection[str]) -> None:
        check_keys(given, {*self.defaults, "betas", "first_lr"})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_numbers(group)
        check_projection(group)

    def _new_states(self, group: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        if group["rule"] != self.rule.name:
            raise ValueError(f"a parameter group has the optimizer's rule, {self.rule.name}, got {group['rule']!r}")
        if group.get("betas") is None and "betas" in self.defaults:
            group["betas"] = self.defaults["betas"]
        # Online Subspace Descent's base rate, where no scheduler keeps an `initial_lr`.
        group.setdefault("first_lr", float(group["lr"]))
        params, place = group["params"], len(self.param_groups) - 1
        names = group.get("param_names") or [f"{place}.{i}" for i in range(len(params))]
        notes = ["" if "param_names" in group else f" ({names[i]}: {name_of(group, i)})" for i in range(len(params))]
        known, states, subspaces = len(self._peers), {}, {}
        try:
            for param, name, note in zip(params, names, notes, strict=True):
                rule = _basis_rule(param, name, note, group)
                if rule:
                    subspaces[param] = Subspace(rule, name, self._peers, note)
                states[param] = self._new_state(param, subspaces.get(param), group)
        except Exception:
            del self._peers[known:]
            for param in set(params) - self.state.keys():
                self._shards.pop(param, None)
                self._dtypes.pop(param, None)
            raise
        self.subspaces.update(subspaces)
        return states

    def _new_state(self, param: Tensor, subspace: Subspace | None, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {"step": counter(0)}
        like, shard = local(param.detach()), Shard.of(param)
        if subspace:
            subspace.init_state(state, like)
            like = like.new_empty(subspace.rule.projection.low_rank_shape(like.shape))
            shard = subspace.rule.projection.low_rank_shard
        self._shards[param], self._dtypes[param] = shard, like.dtype
        own: dict[str, Any] = {}
        self.rule.init_state(own, like, group, shard)
        self._keep_new(param, own, state)
        return state

    def _keep_new(self, param: Tensor, found: dict[str, Any], state: dict[str, Any]) -> None:
        """Take over what the update rule has made, as a checkpoint must see it."""
        shard = self._shards[param]
        for key in [key for key in found if key not in state]:
            divided = self.rule.divided(key, found[key], shard) or (None, None)
            state[key] = distribute_like(found[key], param, *divided)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its state at once. A group that is refused leaves nothing behind."""
        super().add_param_group(param_group)
        for follower in self._followers:
            follower.attach()

    @property
    def has_followers(self) -> bool:
        """Whether something else moves the weights."""
        return bool(self._followers)

    def follow(self, follower: Follower) -> None:
        """Tell `follower`, from now on, of new groups and of the end of updates. It is not kept alive."""
        self._followers.add(follower)

    def unfollow(self, follower: Follower) -> None:
        """Make ordinary updates again, which count themselves."""
        self._followers.discard(follower)
        self.update_step = None

    def dtype_of(self, param: Tensor) -> torch.dtype:
        """Of the gradients that the update rule sees, whatever the parameter has become since construction."""
        return self._dtypes[param]

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

    def _gradient_parts(self) -> list[tuple[Tensor, Shard]]:
        shards = [self._shards[param] for param, _ in self._with_gradients()]
        return list(zip(self.gradients(), shards, strict=True))

    def shard_of(self, param: Tensor) -> Shard:
        """How the gradients that the update rule sees are divided."""
        return self._shards[param]

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

    def _forget(self) -> None:
        self.projected.clear()
        for subspace in self._peers:
            subspace.forget_observed()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, projected ones included: a refresh that was not committed stays due. What was observed
        for this update stays, too."""
        self.projected.clear()
        super().zero_grad(set_to_none)

    def _check_saved_group(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        if saved["rule"] != self.rule.name:  # older states do not name it, and got this optimizer's
            raise other_state("rule", saved["rule"], self.rule.name)
        for param in own["params"]:
            subspace = self.subspaces.get(param)
            if (saved["rank"] is None) != (subspace is None):
                raise other_state("rank", saved["rank"], own["rank"])
            if subspace and basis_rule(saved, Shard.of(param)).kind != subspace.rule.kind:
                names = ("proj_type", "rand_ratio")
                raise other_state(" and ".join(names), *([group[name] for name in names] for group in (saved, own)))

    def _may_differ(self, param: Tensor) -> tuple[frozenset[str], frozenset[str]]:
        subspace, of_rule = self.subspaces.get(param), self.rule.optional
        return of_rule, of_rule | self.rule.older | (subspace.rule.older if subspace else frozenset())

    def _loaded(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if subspace := self.subspaces.get(param):
                    subspace.rule = basis_rule(group, Shard.of(param))  # the loaded group's settings hold
        self._forget()
        for follower in self._followers:
            follower.attach()

    def adopt_saved_form(self, saved: Collection[str], names: dict[Tensor, str]) -> None:
        """Take the form in which a checkpoint of an older version keeps its moments, before it is loaded in place.

        `saved` are the checkpoint's keys, `names` each parameter's part of them: NAME.exp_avg and the like. adamw8bit
        once kept 8-bit moments of small matrices, too; such a run goes on with them.
        """
        for param, name in names.items():
            if param not in self.state:
                continue
            state, subspace = self.state[param], self.subspaces.get(param)
            if self.rule.older and all(f"{name}.{key}" in saved and key not in state for key in self.rule.older):
                like = local(param.detach())
                if subspace:
                    like = like.new_empty(subspace.rule.projection.low_rank_shape(like.shape))
                found: dict[str, Any] = {}
                self.rule.init_older_state(found, like, self._shards[param])
                for key in found:
                    state.pop(key, None)
                self._keep_new(param, found, state)
            if subspace and subspace.rule.older and all(f"{name}.{key}" in saved for key in subspace.rule.older):
                subspace.rule.init_older_state(state)

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and `pickle`: torch's own would leave out what it does not know."""
        return super().__getstate__() | {name: getattr(self, name) for name in _ATTRIBUTES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_followers", weakref.WeakSet())


def wide_norm(parts: Sequence[tuple[Tensor, Shard]]) -> Tensor:
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


def _basis_rule(param: Tensor, name: str, note: str, group: dict[str, Any]) -> BasisRule | None:
    """The rule of a projected parameter, None for another."""
    if group["rank"] is None:
        check_names(group)
        return None
    if param.ndim != 2 or not param.numel():
        empty = "" if param.numel() or param.ndim != 2 else "with entries, "
        raise ValueError(
            f"a projected parameter must be a matrix, {empty}got {name} of shape {tuple(param.shape)}{note}"
        )
    return basis_rule(group, Shard.of(param))
