"""What every basis rule is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peft_pretraining import rng
from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.basis.svd import LinAlgError
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.collectives import Phased
from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.projection import SIDES, Bases, Projection
from peft_pretraining.optim.tensors.state_tensor import StateTensor


@dataclass(frozen=True)
class Refresh:
    """One refresh of one parameter's basis."""

    step: int
    """0-based update."""
    number: int
    """How many refreshes this parameter has had before."""
    seed: int
    name: str
    """The parameter's."""
    grad: Tensor
    """G (m, n), finite, or the mean over several; this device's part."""
    projection: Projection
    bases: Bases
    """Those in use, zeros before the first refresh."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """All of the parameter's tensors, for bases that follow what an update rule has tracked."""

    def generator(self, purpose: str) -> torch.Generator:
        """A pure function of (seed, parameter's name, refresh number), and so the same on every rank."""
        return rng.generator(self.seed, f"{purpose} of {self.name}", step=self.number)


NewBases: TypeAlias = Bases | LinAlgError
"""New bases, or why a gradient could not be decomposed."""


def attempt(compute: Callable[[], Bases]) -> NewBases:
    """Bases, or the error: one matrix's must not keep the others from theirs."""
    try:
        return compute()
    except LinAlgError as error:
        return error


class BasisRule:
    """Makes the bases of one parameter group. They are orthonormal unless the rule says otherwise.

    >>> from peft_pretraining.optim import LowRankOptimizer
    >>> class Coordinates(BasisRule):
    ...     def reads_gradient(self, step):
    ...         return False
    ...
    ...     def compute_basis(self, refresh):
    ...         (side,) = refresh.projection.sides
    ...         basis = refresh.projection.new_bases(refresh.grad)[side]  # (r, n) of zeros
    ...         chosen = torch.randperm(basis.shape[1], generator=refresh.generator("coordinates"))
    ...         return {side: basis.index_put_((torch.arange(len(basis)), chosen[: len(basis)]), torch.ones(()))}
    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> group = {"params": [weight], "basis": Coordinates(), "rank": 2, "proj_type": "right"}
    >>> optimizer = LowRankOptimizer([group], lr=1.0)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> int((weight == 1).sum())
    12
    """

    carries_momentum = False
    """Whether the first moment moves into a new basis, or its coordinates are simply read in the new one."""
    refreshes = True
    """Whether bases are made anew at every `update_proj_gap`, after the first."""
    reads_every_gradient = False
    """Whether `advance` needs G in every update: then gradients are reduced and added up as a whole."""
    masks = False
    """Whether `advance` heeds `update.mask`: of an update that turns out to be one to leave out, bases and the rule's
    own tensors stay as they were. Rules without `advance` need not say so."""
    older: frozenset[str] = frozenset()
    """Keys of the rule's own tensors that only the states of older versions have."""

    @property
    def name(self) -> str:
        """What parameter groups and saved states call it."""
        return type(self).__name__.lower()

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two rules share whose states are interchangeable, sides aside."""
        return (type(self),)

    def projection(self, group: dict[str, Any], shape: torch.Size | ShardInfo) -> Projection:
        """Which sides a weight is projected from, and on how many dimensions."""
        side = group["proj_type"] if group["proj_type"] in SIDES else "std"
        return Projection.for_weight(side, group["rank"], shape)

    def declare_state(self, bases: Bases, projection: Projection, group: dict[str, Any]) -> dict[str, StateTensor]:
        """The rule's own tensors beside the bases, by key."""
        return {}

    def declare_older_state(self, bases: Bases) -> dict[str, StateTensor]:
        """The rule's own tensors as older versions had them."""
        return {}

    def reads_gradient(self, step: int) -> bool:
        """Whether a refresh at this update depends on the gradient."""
        return True

    def compute_bases(self, refreshes: Sequence[Refresh]) -> Phased[list[NewBases]]:
        """New bases for each, in float32 or float64; nothing is stored."""
        return [attempt(partial(self.compute_basis, refresh)) for refresh in refreshes]

    def compute_basis(self, refresh: Refresh) -> Bases:
        """New bases for one matrix, which is not divided over devices. Raises `LinAlgError`."""
        raise NotImplementedError

    def rotate_moments(
        self, state: dict[str, Tensor], projection: Projection, old: Bases, new: Bases, rule: UpdateRule
    ) -> None:
        """Take the state of the update rule from the old bases' coordinates into those of the new ones, where that is
        done."""
        if self.carries_momentum:
            rule.rotate_momentum(
                state, lambda moment: projection.rotate_momentum(moment, old, new), projection.low_rank_shard
            )

    def advance(self, updates: Sequence[ParamUpdate], pace: float) -> Phased[None]:
        """After the weights have moved, without a refresh. `pace`: the rate as a share of the base rate, over
        `update_proj_gap`."""
        return None


def own_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
