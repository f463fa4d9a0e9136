"""Checks of how a model is to be divided over devices, against the method and the model's shape. No torch."""

from __future__ import annotations

from peft_pretraining.config import Config
from peft_pretraining.config.validate import FileFacts
from peft_pretraining.methods import METHODS
from peft_pretraining.models import model_config


def check(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """Settings of the distribution against everything else."""
    distributed = config.distributed
    spec = METHODS.get(config.method.method)
    if distributed.distributed_type == "fsdp":
        _check_fsdp(config, facts, problems)
    else:
        if distributed.replicas > 1:
            warnings.append("--replicas has no effect without --distributed_type fsdp")
        if not distributed.reshard_after_forward:
            warnings.append("--reshard_after_forward has no effect without --distributed_type fsdp")
    whole = spec is None or not spec.allows.projected_gradient or distributed.distributed_type == "fsdp"
    if distributed.reduce_low_rank and whole:
        warnings.append("--reduce_low_rank has no effect: this method or layout does not reduce projected gradients")


def _check_fsdp(config: Config, facts: FileFacts, problems: list[str]) -> None:
    world, replicas = config.batch.world_size, config.distributed.replicas
    spec = METHODS.get(config.method.method)
    if world % replicas:
        problems.append(f"--replicas {replicas} must divide the {world} processes")
        return
    if spec is None:
        return
    if not spec.allows.fsdp:
        problems.append(f"--distributed_type fsdp: method {spec.name} does not declare that it can be divided: use ddp")
    elif spec.check_sharding:
        inputs = model_config.linear_inputs(facts.model) if facts.model is not None else {}
        problems += spec.check_sharding(config, inputs, world // replicas)
