"""What every update rule is asked for, and arithmetic on state that may be divided over devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.optim.tensors.collectives import Collective, Phased
from peft_pretraining.optim.tensors.param_update import Direction, ParamUpdate
from peft_pretraining.optim.tensors.state_tensor import StateTensor, counter


class UpdateRule:
    """Turns the gradients of one parameter group, in the coordinates they arrive in, into directions.

    >>> from peft_pretraining.optim import Direction, LowRankOptimizer, StateTensor
    >>> class Momentum(UpdateRule):
    ...     def declare_state(self, like, group, shard=WHOLE):
    ...         return {"exp_avg": StateTensor.like_gradient(torch.zeros_like(like), shard)}
    ...
    ...     def directions(self, updates, group):
    ...         moments = [update.state["exp_avg"] for update in updates]
    ...         torch._foreach_lerp_(moments, [update.low_rank_grad for update in updates], 0.1)
    ...         return [Direction(moment, update.rate) for moment, update in zip(moments, updates)]
    >>> weight = torch.nn.Parameter(torch.zeros(6, 4))
    >>> optimizer = LowRankOptimizer([{"params": [weight], "rule": Momentum(), "rank": 2}], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> tuple(optimizer.state[weight]["exp_avg"].shape), optimizer.param_groups[0]["rule"]
    ((6, 2), 'momentum')
    """

    decays_first = False
    """Whether decoupled weight decay, W <- W - lr * decay * W, comes before the update or after it."""
    lift: str | None = None
    """The lift that goes with the rule; None: `project_back` where there is a basis, else `identity`."""
    moves_weights = False
    """Whether the rule goes without basis and lift, and moves the weights itself (`move`)."""
    widens = False
    """Whether a rule that moves weights takes gradients and moments in any dtype, and computes in float32 at least."""
    masks = False
    """Whether `directions` heeds `update.mask`: of an update that turns out to be one to leave out the state stays as
    it was, and D is zeros. `batches` does that for what is written with it. A rule that says nothing is asked only for
    updates that take place: the optimizer then waits for the device to know."""
    shares_work = False
    """Whether the devices of a run that all have the same gradients each do the work of some matrices (the `owner` of
    each) and hand it on. Where devices divide the matrices, rules may do so in any case."""
    betas: tuple[float, float] | None = None
    """What `betas` are where a group does not say."""
    first_moment = "exp_avg"
    """Key of the first moment in the state, where there is one."""
    optional: frozenset[str] = frozenset()
    """Keys of the state that settings switch on and off while training goes on."""
    intermittent: frozenset[str] = frozenset()
    """Keys of the state that the rule itself adds and deletes while training goes on."""
    older: frozenset[str] = frozenset()
    """Keys of the state that only those of older versions have for some parameters."""

    @property
    def name(self) -> str:
        """What parameter groups and saved states call it."""
        return type(self).__name__.lower()

    def in_format(self, state_format: str) -> UpdateRule:
        """The rule that keeps its state in this format. Raises `ValueError` where there is none."""
        if state_format == "8bit":
            raise ValueError(f"state_format must be published, weight or float32 with {self.name}, got '8bit'")
        return self

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        """How much of the first moment an update keeps; 1 for rules of which nobody knows."""
        return 1.0

    def new_step(self, param: Tensor) -> Tensor:
        """The parameter's count of updates, zero."""
        return counter(0)

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        """The rule's tensors, by key, for gradients of `like`'s shape, dtype and device, divided as `shard` says."""
        return {}

    def declare_older_state(self, like: Tensor, shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        """The rule's tensors as older versions had them."""
        return {}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phased[list[Direction | None]]:
        """D for each `update.low_rank_grad`, which stays as it is; None where the weight is to stay, undecayed.

        The state's tensors are changed in place. Declared ones that are `optional` or `intermittent` may be added and
        deleted.
        """
        raise NotImplementedError

    def move(
        self,
        updates: Sequence[ParamUpdate],
        group: dict[str, Any],
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Moves the weights, decay included, where the rule `moves_weights`. `found_inf` and `grad_scale`: as torch's
        fused optimizers take them, an update to be left out and what the gradients are to be divided by."""
        raise NotImplementedError

    def must_know(self, k: int) -> bool:
        """Whether a rule that masks needs somebody to know whether its update takes place, of parameters with `k`
        updates, this one included: then the optimizer waits for the device."""
        return False

    def rotate_momentum(
        self, state: dict[str, Tensor], change: Callable[[Tensor], Tensor], shard: ShardInfo = WHOLE
    ) -> None:
        """Put the first moment through `change`, which rotates it into a new basis."""
        if (moment := state.get(self.first_moment)) is not None:
            moment.copy_(change(moment))


def upright(matrix: Tensor, shard: ShardInfo) -> Tensor:
    """A matrix turned so that its rows are what devices divide: then a device has whole blocks of numbers."""
    return matrix.T if matrix.ndim == 2 and shard.along == 1 else matrix


def mean_over(part: Tensor, axis: int, shard: ShardInfo, shape: torch.Size) -> Collective:
    """What `mean_from` makes the mean over a dimension of, counted from the end of `shape`: of one matrix, or of what
    else `part` has one of, or several. Over all devices where that dimension is divided."""
    return Collective(part.sum(axis), shard) if _is_divided(axis, shard, shape) else Collective(part.mean(axis), WHOLE)


def mean_from(answer: Tensor, axis: int, shard: ShardInfo, shape: torch.Size) -> Tensor:
    """The mean that was asked for by `mean_over`."""
    return answer / shard.shape[len(shape) + axis] if _is_divided(axis, shard, shape) else answer


def _is_divided(axis: int, shard: ShardInfo, shape: torch.Size) -> bool:
    return shard.dim == len(shape) + axis
