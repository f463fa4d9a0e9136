"""The state of the composed optimizer: what each parameter has, what a saved state must agree in, who is told."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.basis.bases import basis_rule
from peft_pretraining.optim.basis.subspace import Projected, Subspace
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.state.base import InPlaceOptimizer
from peft_pretraining.optim.state.saved_state import other_state
from peft_pretraining.optim.state.settings import check_keys, check_numbers, check_projection
from peft_pretraining.optim.state.slots import Objects, Slot, as_saved, choose_owners, new_slots, objects_of

_ATTRIBUTES = (
    "rule",
    "update_step",
    "subspaces",
    "refresh_metrics",
    "projected",
    "full_norm",
    "refresh_accumulation",
    "_peers",
    "_slots",
)
"""What a copy of the optimizer takes along, besides groups and state."""

GROUP_DEFAULTS: dict[str, Any] = {
    "rank": None,
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
    "rand_ratio": None,
    "num_training_steps": None,
    "stagger_refresh": False,
    "basis": None,
    "lift": None,
    "state_format": "published",
    "basis_dtype": "auto",
    "rounding": "nearest",
}


class Follower(Protocol):
    """Something that moves the optimizer's weights itself, inside the backward pass."""

    def attach(self) -> None:
        """The optimizer has new parameters or groups."""

    def begin(self, frozen: bool) -> None:
        """An update begins; the gradients of one that is `frozen` move nothing."""

    def begin_micro_batch(self, index: int, count: int) -> None:
        """The forward pass of a micro-batch begins."""

    def grad_norm(self) -> Tensor:
        """Global norm of the update's gradients before they were clipped, each on its own."""

    def finish(self) -> None:
        """The backward passes of an update are over."""

    def read_late(self) -> None:
        """Updates are to go on without a look at whether their gradients are finite."""

    def settle(self) -> None:
        """Take back what was counted for parameters whose gradients were not finite; the host may have to wait."""


class Backward(Protocol):
    """Where R of some weights comes from in place of `param.grad`: their layers' backward passes."""

    @property
    def leaves(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Weights -> parameters of no model whose gradients are to be averaged over the ranks in their place."""

    def begin(self, step: int) -> None:
        """An update begins."""

    def begin_micro_batch(self, index: int, count: int) -> None:
        """The forward pass of a micro-batch begins."""

    def observe(self) -> None:
        """The gradients of an extra batch are complete."""

    def complete(self) -> None:
        """The gradients of an update are complete."""

    def has_arrived(self, weight: Tensor) -> bool:
        """Whether a weight's R is there."""

    def comes_from_here(self, weight: Tensor) -> bool:
        """Whether a weight's R never comes from anywhere else."""

    def take(self, weight: Tensor) -> Projected:
        """A weight's R, and what becomes of its bases."""

    def drop(self) -> None:
        """Forget the gradients."""

    # For updates inside the backward pass.

    def hand_over_to(self, arrives: Callable[[Tensor, Tensor], None] | None) -> None:
        """Let a bound method have each weight's G as it comes; it is not kept alive."""

    def hand_over_drawn(self) -> dict[Tensor, Projected]:
        """Bases that were drawn for this update; first ones are in place."""

    def leaf_of(self, weight: Tensor) -> Tensor | None:
        """What gets a weight's R as its gradient."""

    def weight_of(self, leaf: Tensor) -> Tensor:
        """Whose R it gets."""

    def take_part(self, weight: Tensor) -> Tensor:
        """R of one micro-batch, which is forgotten here."""

    def project_from_now(self, weight: Tensor) -> None:
        """Form no further G in this update: the stored bases are those to project in."""


class SubspaceOptimizer(InPlaceOptimizer):
    """Every parameter has a `Slot` with the objects of its group, and the state that they declare."""

    backward: Backward | None = None
    """Takes the gradients of some weights from the backward passes of their layers; not that of a copy."""

    def _has_gradient(self, param: Tensor) -> bool:
        return super()._has_gradient(param) or (self.backward is not None and self.backward.has_arrived(param))

    @property
    def leaves(self) -> Mapping[nn.Parameter, nn.Parameter]:
        return super().leaves if self.backward is None else self.backward.leaves

    def _begin(self, rule: UpdateRule) -> None:
        """What there is before the first group."""
        self.rule = rule
        self.update_step = None
        self.subspaces: dict[Tensor, Subspace] = {}
        self.refresh_metrics: dict[str, list[Tensor]] = {}
        """Of the last update's refreshes, one number per weight: captured energy, overlap with the basis before."""
        self._peers: list[Subspace] = []
        self._slots: dict[Tensor, Slot] = {}
        self.projected: dict[Tensor, Projected] = {}
        """Gradients that wait for `step`."""
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()

    def _check_keys(self, given: Collection[str]) -> None:
        check_keys(given, {*self.defaults, "betas", "first_lr"})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_numbers(group)
        check_projection(group)

    def _new_states(self, group: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        if group["rule"] == self.rule.name:
            group["rule"] = self.rule  # which may be an object that was given
        objects = objects_of(group)
        betas = objects.rule.betas or self.defaults.get("betas")  # schedulers want some, whether the rule does or not
        if group.get("betas") is None and betas is not None:
            group["betas"] = betas
        # Online Subspace Descent's base rate, where no scheduler keeps an `initial_lr`.
        group.setdefault("first_lr", float(group["lr"]))
        known = len(self._peers)
        try:
            slots = dict(new_slots(group, objects, len(self.param_groups) - 1, self._peers))
            states = {param: self._new_state(param, slot, group) for param, slot in slots.items()}
        except Exception:
            del self._peers[known:]
            raise
        choose_owners(slots.values(), self._slots.values())
        self._slots.update(slots)
        self.subspaces.update({param: slot.subspace for param, slot in slots.items() if slot.subspace})
        return states

    def _new_state(self, param: Tensor, slot: Slot, group: dict[str, Any]) -> dict[str, Any]:
        return {key: as_saved(tensor, param) for key, tensor in slot.declared(param, group).items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its state at once. A group that is refused leaves nothing behind."""
        rule = param_group.get("rule", self.rule.name) if isinstance(param_group, dict) else self.rule.name
        if getattr(rule, "name", rule) != self.rule.name:
            param_group = {"betas": None, **param_group}  # those of its rule, not of the optimizer's
        super().add_param_group(param_group)
        for follower in self._followers:
            follower.attach()

    @property
    def has_followers(self) -> bool:
        """Whether something else moves the weights."""
        return bool(self._followers)

    def follow(self, follower: Follower) -> None:
        """Tell `follower`, from now on, of new groups and of updates. It is not kept alive."""
        self._followers.add(follower)

    def unfollow(self, follower: Follower) -> None:
        """Make ordinary updates again, which count themselves."""
        self._followers.discard(follower)
        self.update_step = None

    def objects(self, param: Tensor) -> Objects:
        """What a parameter is updated by."""
        return self._slots[param].objects

    def name_of(self, param: Tensor) -> str:
        """A parameter's name, or its place."""
        return self._slots[param].name

    def dtype_of(self, param: Tensor) -> torch.dtype:
        """Of the gradients that the update rule sees, whatever the parameter has become since construction."""
        return self._slots[param].dtype

    def shard_of(self, param: Tensor) -> ShardInfo:
        """How the gradients that the update rule sees are divided."""
        return self._slots[param].low_rank_shard

    def _as_called_now(self, saved: dict[str, Any]) -> dict[str, Any]:
        older = saved.get("state_format") == "weight" and "rounding" not in saved
        return {**saved, "state_format": "published"} if older else saved

    def _check_saved_group(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        for name in ("rule", "basis", "lift", "state_format"):  # what older states do not name they got from `own`
            if saved[name] != own[name]:
                raise other_state(name, saved[name], own[name])
        if (saved["basis_dtype"] == "int8") != (own["basis_dtype"] == "int8"):
            raise other_state("basis_dtype", saved["basis_dtype"], own["basis_dtype"])
        for param in own["params"]:
            subspace = self._slots[param].subspace
            if (saved["rank"] is None) != (subspace is None):
                raise other_state("rank", saved["rank"], own["rank"])
            if subspace and not self.objects(param).basis_is_given:
                rule = basis_rule(saved)
                kind = (*rule.kind, rule.projection(saved, ShardInfo.of(param)).sides)
                if kind != subspace.kind:
                    names = ("proj_type", "rand_ratio")
                    found, expected = ([group[name] for name in names] for group in (saved, own))
                    raise other_state(" and ".join(names), found, expected)

    def _may_differ(self, param: Tensor) -> tuple[frozenset[str], frozenset[str]]:
        slot = self._slots[param]
        return slot.optional, slot.optional | slot.older

    def _loaded(self) -> None:
        for group in self.param_groups:
            objects = self.objects(group["params"][0]) if group["params"] else None
            if objects and objects.basis and not objects.basis_is_given:
                objects = replace(objects, basis=basis_rule(group))  # the loaded group's settings hold
                for param in group["params"]:
                    self._slots[param].take(objects)
        self._forget()
        for follower in self._followers:
            follower.attach()

    def adopt_saved_form(self, saved: Collection[str], names: dict[Tensor, str]) -> None:
        """Take the form in which a checkpoint keeps a parameter's state, before it is loaded in place.

        `saved` are the checkpoint's keys, `names` each parameter's part of them: NAME.exp_avg and the like. adamw8bit
        once kept 8-bit moments of small matrices, too; such a run goes on with them. What an object may add and delete
        while training goes on is there if the checkpoint has it.
        """
        for param, name in names.items():
            if param not in self.state:
                continue
            state, slot = self.state[param], self._slots[param]
            rule, basis = slot.objects.rule, slot.objects.basis
            older = {}
            if rule.older and all(f"{name}.{key}" in saved and key not in state for key in rule.older):
                older = rule.declare_older_state(slot.like_gradient(param), slot.low_rank_shard)
            if slot.subspace and basis and basis.older and all(f"{name}.{key}" in saved for key in basis.older):
                older |= basis.declare_older_state(slot.subspace.bases(self.local_state(param)))
            state.update({key: as_saved(tensor, param) for key, tensor in older.items()})
            declared = slot.declared(param, self.group_of(param)) if slot.intermittent else {}
            for key in slot.intermittent:
                if f"{name}.{key}" not in saved:
                    state.pop(key, None)
                elif key not in state and key in declared:
                    state[key] = as_saved(declared[key], param)

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
