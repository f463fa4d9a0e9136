"""How a model and its gradients are divided over devices, and its checkpoints written: a section of `Config`.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import boolean, choice, positive_int, setting


@dataclass(frozen=True)
class DistributedConfig:
    distributed_type: str = setting(
        "ddp", choice("ddp", "fsdp"), "ddp: a whole model on each device; fsdp: weights, gradients and states divided"
    )
    replicas: int = setting(1, positive_int, "fsdp: copies of the divided model (HSDP); must divide the processes")
    reshard_after_forward: bool = setting(
        True, boolean, "fsdp: free gathered weights between forward and backward pass"
    )
    reduce_low_rank: bool | None = setting(
        None, boolean, "ddp: reduce R instead of G between refreshes (default: where the method allows it)"
    )
    async_save: bool = setting(
        False, boolean, "write checkpoints beside the training, which waits only for a copy in the host's memory"
    )
