"""Process groups and parallel models. Nothing outside this folder knows about torch.distributed.

Imports of the package: `flags`, `runtime`.
"""

from peft_pretraining.distributed.low_rank_reduction import LowRankReduction
from peft_pretraining.distributed.parallel import (
    Sharding,
    free_gathered_weights,
    parallelize,
    shard,
    synchronised_backward,
)
from peft_pretraining.distributed.process_group import CheckpointGroup, ProcessGroup, mean_over_processes
from peft_pretraining.distributed.sharded_optimizer import own_share, sharded_optimizer
from peft_pretraining.distributed.wide_sums import add_up_in_float32

__all__ = [
    "CheckpointGroup",
    "LowRankReduction",
    "ProcessGroup",
    "Sharding",
    "add_up_in_float32",
    "free_gathered_weights",
    "mean_over_processes",
    "own_share",
    "parallelize",
    "shard",
    "sharded_optimizer",
    "synchronised_backward",
]
