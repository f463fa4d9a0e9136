"""What every update rule is asked for, and arithmetic on state that may be divided over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo


class UpdateRule:
    decays_first = False
    """Whether decoupled weight decay, W <- W - lr * decay * W, comes before the update or after it."""
    acts_in_full_space = False
    """Whether `finish` must see the whole update, projected back."""
    betas: tuple[float, float] | None = None
    """What `betas` are where a group does not say."""
    first_moment = "exp_avg"
    """Key of the first moment in the state, where there is one."""
    optional: frozenset[str] = frozenset()
    """Keys of the state that settings switch on and off while training goes on."""
    older: frozenset[str] = frozenset()
    """Keys of the state that only those of older versions have for some parameters."""

    @property
    def name(self) -> str:
        """What parameter groups and saved states call it."""
        return type(self).__name__.lower()

    def init_older_state(self, state: dict[str, Any], like: Tensor, shard: ShardInfo = WHOLE) -> None:
        """Create the rule's tensors as older versions had them."""

    def init_state(self, state: dict[str, Any], like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> None:
        """Create the rule's tensors for gradients of `like`'s shape, dtype and device."""

    def direction(
        self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE
    ) -> tuple[Tensor, float]:
        """D, in the shape of `grad`, and the factor (rate included) to subtract it with."""
        raise NotImplementedError

    def finish(self, update: Tensor) -> Tensor:
        """The last step, in full space and possibly in place."""
        return update

    def divided(self, key: str, value: Tensor, shard: ShardInfo) -> tuple[int, int] | None:
        """The dimension of a state tensor, `value`, that is divided as the gradients are, and its whole length; None
        if every device has the same."""
        return None if shard.dim is None else (shard.dim, shard.shape[shard.dim])

    def rotate(self, state: dict[str, Any], change: Callable[[Tensor], Tensor], shard: ShardInfo = WHOLE) -> None:
        """Put the first moment through `change`, which carries it into a new basis."""
        if (moment := state.get(self.first_moment)) is not None:
            moment.copy_(change(moment))


def upright(matrix: Tensor, shard: ShardInfo) -> Tensor:
    """A matrix turned so that its rows are what devices divide: then a device has whole blocks of numbers."""
    return matrix.T if matrix.ndim == 2 and shard.along == 1 else matrix


def mean(part: Tensor, dim: int, shard: ShardInfo) -> Tensor:
    """Mean over a dimension of a tensor, over all devices where it is divided."""
    if shard.dim != dim:
        return part.mean(dim)
    return shard.sum(part.sum(dim)) / shard.shape[dim]


def zeros(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of the same shape, contiguous whatever `like` is."""
    return torch.zeros(like.shape, dtype=dtype or like.dtype, device=like.device)
