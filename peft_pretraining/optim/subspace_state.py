"""The state of the projected optimizer: what each parameter has, what a saved state must agree in, who is told."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo, distribute_like, local
from peft_pretraining.optim.base import InPlaceOptimizer, name_of, other_state
from peft_pretraining.optim.bases import BasisRule, basis_rule, check_names
from peft_pretraining.optim.settings import check_keys, check_numbers, check_projection
from peft_pretraining.optim.subspace import Projected, Subspace, counter
from peft_pretraining.optim.update_rules import UpdateRule

_ATTRIBUTES = ("rule", "update_step", "subspaces", "refresh_metrics", "projected", "_peers", "_shards", "_dtypes")
"""What a copy of the optimizer takes along, besides groups and state."""

GROUP_DEFAULTS = {
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


class SubspaceOptimizer(InPlaceOptimizer):
    """Groups with a `rank` have a `Subspace` for each weight, and all parameters the state of one update rule."""

    _on_cpu = frozenset({"step", "last_refresh", "refreshes", "basis_step"})

    def _begin(self, rule: UpdateRule) -> None:
        """What there is before the first group."""
        self.rule = rule
        self.update_step: int | None = None
        self.subspaces: dict[Tensor, Subspace] = {}
        self.refresh_metrics: dict[str, list[Tensor]] = {}
        """Of the last update's refreshes, one number per weight: captured energy, overlap with the basis before."""
        self._peers: list[Subspace] = []
        self._shards: dict[Tensor, ShardInfo] = {}  # of the gradients that the update rule sees
        self._dtypes: dict[Tensor, torch.dtype] = {}  # of these: the weights' at construction
        self.projected: dict[Tensor, Projected] = {}
        """Gradients that wait for `step`."""
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()

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
        like, shard = local(param.detach()), ShardInfo.of(param)
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

    def shard_of(self, param: Tensor) -> ShardInfo:
        """How the gradients that the update rule sees are divided."""
        return self._shards[param]

    def _check_saved_group(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        if saved["rule"] != self.rule.name:  # older states do not name it, and got this optimizer's
            raise other_state("rule", saved["rule"], self.rule.name)
        for param in own["params"]:
            subspace = self.subspaces.get(param)
            if (saved["rank"] is None) != (subspace is None):
                raise other_state("rank", saved["rank"], own["rank"])
            if subspace and basis_rule(saved, ShardInfo.of(param)).kind != subspace.rule.kind:
                names = ("proj_type", "rand_ratio")
                raise other_state(" and ".join(names), *([group[name] for name in names] for group in (saved, own)))

    def _may_differ(self, param: Tensor) -> tuple[frozenset[str], frozenset[str]]:
        subspace, of_rule = self.subspaces.get(param), self.rule.optional
        return of_rule, of_rule | self.rule.older | (subspace.rule.older if subspace else frozenset())

    def _loaded(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if subspace := self.subspaces.get(param):
                    subspace.rule = basis_rule(group, ShardInfo.of(param))  # the loaded group's settings hold
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

    def _forget(self) -> None:
        self.projected.clear()
        for subspace in self._peers:
            subspace.forget_observed()

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and `pickle`: torch's own would leave out what it does not know."""
        return super().__getstate__() | {name: getattr(self, name) for name in _ATTRIBUTES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_followers", weakref.WeakSet())


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
    return basis_rule(group, ShardInfo.of(param))
