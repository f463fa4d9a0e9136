"""The 8-bit AdamW of matrices that several devices divide by columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.optim.rules.adamw import AdamW8bit
from peft_pretraining.optim.tensors.param_update import Direction, ParamUpdate
from peft_pretraining.optim.tensors.state_tensor import StateTensor


class ColumnsAdamW8bit(AdamW8bit):
    """`AdamW8bit` whose blocks run along columns on a single device, too: so a state fits any number of them."""

    name = "adamw8bit"

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        return super().declare_state(like, group, _by_columns(shard))

    def declare_older_state(self, like: Tensor, shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        return super().declare_older_state(like, _by_columns(shard))

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        turned = [replace(update, low_rank_shard=_by_columns(update.low_rank_shard)) for update in updates]
        return super().directions(turned, group)


def _by_columns(shard: ShardInfo) -> ShardInfo:
    return replace(shard, along=1) if shard.dim is None else shard
