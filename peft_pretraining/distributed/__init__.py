"""Process groups and parallel models. Nothing outside this folder knows about torch.distributed."""

from peft_pretraining.distributed.parallel import parallelize, synchronised_backward
from peft_pretraining.distributed.process_group import ProcessGroup
from peft_pretraining.distributed.sharded_optimizer import own_share, sharded_optimizer

__all__ = ["ProcessGroup", "own_share", "parallelize", "sharded_optimizer", "synchronised_backward"]
