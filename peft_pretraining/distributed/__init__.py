"""Process groups and parallel models. Nothing outside this folder knows about torch.distributed."""

from peft_pretraining.distributed.parallel import parallelize, synchronised_backward
from peft_pretraining.distributed.process_group import ProcessGroup

__all__ = ["ProcessGroup", "parallelize", "synchronised_backward"]
