"""The four objects of each parameter, as its group names them, and the state that they declare."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo, distribute_like, local
from peft_pretraining.distributed.team import deal_out
from peft_pretraining.optim.basis.bases import basis_rule, check_names
from peft_pretraining.optim.basis.basis_rule import BasisRule
from peft_pretraining.optim.basis.subspace import Subspace
from peft_pretraining.optim.rules.lifts import LIFTS, Lift
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.rules.update_rules import UPDATE_RULES
from peft_pretraining.optim.state.base import name_of
from peft_pretraining.optim.tensors.mask import Mask
from peft_pretraining.optim.tensors.projection import Projection
from peft_pretraining.optim.tensors.state_tensor import (
    BASIS_DTYPES,
    FASTEST_FORGOTTEN,
    ROUNDINGS,
    STATE_FORMATS,
    StateTensor,
    basis_storage,
    working_dtype,
)


@dataclass(frozen=True)
class Objects:
    """What a parameter group is updated by. One of each for all of its parameters."""

    rule: UpdateRule
    basis: BasisRule | None
    lift: Lift
    state_format: str
    basis_dtype: str = "auto"
    rounds_stochastically: bool = False
    """Whether bfloat16 weights are, instead of to nearest."""
    basis_is_given: bool = False
    """Whether the basis rule is an object that was given: then no setting of the group changes it."""

    @property
    def rounds_once(self) -> bool:
        """Whether a weight's decay and step are added up before it is rounded."""
        return self.rounds_stochastically or self.state_format in ("float32", "weight")

    @property
    def reads_gradient(self) -> bool:
        """Whether every update needs G, not only R, of the group's matrices."""
        return self.lift.reads_gradient or (self.basis is not None and self.basis.reads_every_gradient)

    @property
    def masks(self) -> bool:
        """Whether an update needs nobody to know whether it takes place, if no new bases are stored in it."""
        basis = self.basis is None or self.basis.refreshes or self.basis.masks
        return (self.rule.masks or self.rule.moves_weights) and self.lift.masks and basis


def objects_of(group: dict[str, Any]) -> Objects:
    """The objects that a group gives or names, whose names it keeps from then on: objects cannot be saved.

    Raises `ValueError` for names that do not exist and for what does not go together.
    """
    state_format = group["state_format"]
    if state_format not in STATE_FORMATS:
        raise ValueError(f"state_format must be one of {', '.join(STATE_FORMATS)}, got {state_format!r}")
    if group["basis_dtype"] not in BASIS_DTYPES:
        raise ValueError(f"basis_dtype must be one of {', '.join(BASIS_DTYPES)}, got {group['basis_dtype']!r}")
    rule, rounding = update_rule(group["rule"]), group["rounding"]
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    # A rule that moves weights itself rounds them to nearest.
    lifted = rounding == "stochastic" and rule.moves_weights and state_format == "published"
    rule = rule.in_format("weight" if lifted else state_format)
    basis, lift = group["basis"], group["lift"]
    given = isinstance(basis, BasisRule)
    if not given:
        check_names(group)
        if group["rank"] is None and basis is not None:
            raise ValueError(f"basis {basis!r} needs a rank in the same group")
        basis = None if group["rank"] is None else basis_rule(group)
    if basis is not None and group["rank"] is None:
        raise ValueError(f"basis {basis.name!r} needs a rank in the same group")
    if basis is not None and group["basis_dtype"] == "int8" and not basis.refreshes:
        raise ValueError(
            f"basis_dtype 'int8' does not go with basis {basis.name!r}, which moves by less than 8 bits can show in "
            "every update"
        )
    if not isinstance(lift, Lift):
        if lift is not None and lift not in LIFTS:
            raise ValueError(f"lift must be one of {', '.join(LIFTS)}, or an object, got {lift!r}")
        lift = LIFTS[lift or rule.lift or ("identity" if basis is None else "project_back")]()
    if rule.moves_weights and (basis is not None or not isinstance(lift, LIFTS["identity"])):
        raise ValueError(f"rule {rule.name!r} moves weights as they are: it goes without rank and lift")
    for name in ("rule", "basis", "lift"):
        if not isinstance(group[name], str | None):
            group[name] = group[name].name
    return Objects(rule, basis, lift, state_format, group["basis_dtype"], rounding == "stochastic", given)


def update_rule(rule: Any) -> UpdateRule:
    """The update rule of a name; objects are taken as they are. Raises `ValueError` for names that do not exist."""
    if isinstance(rule, UpdateRule):
        return rule
    if not isinstance(rule, str) or rule not in UPDATE_RULES:
        raise ValueError(f"rule must be one of {', '.join(UPDATE_RULES)}, or an object, got {rule!r}")
    return UPDATE_RULES[rule]()


_NO_PROJECTION = Projection()


class Slot:
    """One parameter's place in the optimizer."""

    def __init__(self, param: Tensor, index: int, name: str, objects: Objects, subspace: Subspace | None):
        self.index, self.name, self.objects, self.subspace = index, name, objects, subspace
        self.shard = ShardInfo.of(param)
        """How W and G are divided."""
        self.dtype = working_dtype(objects.state_format, param.dtype)
        """Of R, D, bases and moments, whatever the parameter becomes after construction."""
        self.low_rank_shard = subspace.projection.low_rank_shard if subspace else self.shard
        """How the gradients that the update rule sees are divided."""
        if objects.rule.shares_work:
            self.low_rank_shard = self.low_rank_shard.shared()
        self.owner = 0
        """The place, among the devices of `low_rank_shard`'s team, of the one that does what needs the whole."""
        self.numbers = self.low_rank_shard.shape.numel()
        """Of these, over all devices."""

    def take(self, objects: Objects) -> None:
        """Go on with other objects of the same kinds."""
        self.objects = objects
        if self.subspace and objects.basis:
            self.subspace.rule = objects.basis

    @property
    def projection(self) -> Projection:
        return self.subspace.projection if self.subspace else _NO_PROJECTION

    def like_gradient(self, param: Tensor) -> Tensor:
        """A tensor like those that the update rule sees: this device's part, its values without meaning."""
        like = local(param.detach())
        if self.subspace is None:
            return like.to(self.dtype)
        return like.new_empty(self.projection.low_rank_shape(like.shape), dtype=self.dtype)

    def declared(self, param: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """All tensors of the state, with the values that they begin with. Raises `ValueError` if two have one key."""
        weight = local(param.detach()).to(self.dtype)
        parts = [
            {"step": StateTensor(self.objects.rule.new_step(param))},
            self.subspace.declare_state(weight, group) if self.subspace else {},
            self.objects.rule.declare_state(self.like_gradient(param), group, self.low_rank_shard),
            self.objects.lift.declare_state(weight, self.projection, group, self.shard),
        ]
        declared = {key: tensor for part in parts for key, tensor in part.items()}
        key = self.objects.rule.first_moment
        if key in declared and self._narrows(group):
            declared[key] = replace(declared[key], value=declared[key].value.to(param.dtype))
        if len(declared) < sum(map(len, parts)):
            raise ValueError(f"two of the objects of {self.name} declare state of the same name: {', '.join(declared)}")
        return declared

    def _narrows(self, group: dict[str, Any]) -> bool:
        """Whether the first moment is kept in the weight's dtype, and the rest of the state is not."""
        decay = self.objects.rule.first_moment_decay(group)
        return self.objects.state_format == "weight" and decay <= FASTEST_FORGOTTEN

    @property
    def optional(self) -> frozenset[str]:
        """Keys of the state that a saved one may lack or have in addition."""
        return self.objects.rule.optional | self.intermittent

    @property
    def intermittent(self) -> frozenset[str]:
        """Keys of the state that objects add and delete by themselves."""
        return self.objects.rule.intermittent | self.objects.lift.intermittent

    @property
    def older(self) -> frozenset[str]:
        """Keys of the state that only those of older versions have."""
        return self.objects.rule.older | (self.objects.basis.older if self.objects.basis else frozenset())


def new_slots(group: dict[str, Any], objects: Objects, place: int, peers: list[Subspace]) -> list[tuple[Tensor, Slot]]:
    """The slots of a group's parameters, the `place`-th of an optimizer. Raises `ValueError` for what is no matrix, but
    is to be projected; `peers` may be longer then."""
    params = group["params"]
    names = group.get("param_names") or [f"{place}.{index}" for index in range(len(params))]
    slots = []
    for index, (param, name) in enumerate(zip(params, names, strict=True)):
        note = "" if "param_names" in group else f" ({name}: {name_of(group, index)})"
        subspace = None
        if objects.basis is not None:
            if param.ndim != 2 or not param.numel():
                empty = "" if param.numel() or param.ndim != 2 else "with entries, "
                raise ValueError(
                    f"a projected parameter must be a matrix, {empty}got {name} of shape {tuple(param.shape)}{note}"
                )
            projection = replace(
                objects.basis.projection(group, ShardInfo.of(param)),
                stored=basis_storage(objects.basis_dtype, objects.state_format, param.dtype),
                working=working_dtype(objects.state_format, param.dtype),
            )
            subspace = Subspace(objects.basis, projection, name, peers, note)
        slots.append((param, Slot(param, index, name, objects, subspace)))
    return slots


def choose_owners(slots: Collection[Slot], before: Collection[Slot]) -> None:
    """Deal matrices out to the devices of their team, which have those of other groups besides."""
    matrices = [slot for slot in slots if len(slot.low_rank_shard.shape) == 2]
    for size in {slot.low_rank_shard.team.size for slot in matrices} - {1}:
        alike = [slot for slot in matrices if slot.low_rank_shard.team.size == size]
        loads = [0.0] * size
        for slot in before:
            if slot.low_rank_shard.team.size == size:
                loads[slot.owner] += _cost(slot)
        for slot, owner in zip(alike, deal_out([_cost(slot) for slot in alike], size, loads), strict=True):
            slot.owner = owner


def _cost(slot: Slot) -> float:
    """p² q of a matrix (p, q), p <= q: what products of it and its Gram matrix take."""
    shape = slot.low_rank_shard.shape
    return float(min(shape) ** 2 * max(shape)) if len(shape) == 2 else 0.0


def as_saved(tensor: StateTensor, param: Tensor) -> Tensor:
    """A tensor of the state as a checkpoint must see it: a DTensor over the parameter's devices if it is divided."""
    return distribute_like(tensor.value, param, tensor.dim, tensor.length)


def keep_changes(
    slot: Slot,
    param: Tensor,
    found: dict[str, Tensor],
    state: dict[str, Any],
    group: dict[str, Any],
    mask: Mask | None = None,
) -> None:
    """Take over what the objects have added to a parameter's state, and drop what they have deleted from it."""
    if found.keys() == state.keys():
        return
    if mask is not None:
        mask.undo(partial(_put_back, state, dict(state)))
    for key in state.keys() - found.keys():
        del state[key]
    if added := found.keys() - state.keys():
        declared = slot.declared(param, group)
        for key in added:
            example = declared[key]
            kept = found[key].to(example.value.dtype)  # of a first moment, perhaps the weight's
            state[key] = as_saved(StateTensor(kept, example.dim, example.length), param)


def _put_back(state: dict[str, Any], before: dict[str, Any]) -> None:
    state.clear()
    state.update(before)
