"""Checks of how a model is to be divided over devices, against the method and the model's shape. No torch."""

from __future__ import annotations

from peft_pretraining.config import Config
from peft_pretraining.config.validate import FileFacts
from peft_pretraining.methods import METHODS
from peft_pretraining.models import model_config


def check_distribution(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """Settings of the distribution against everything else."""
    method, distributed = config.method, config.distributed
    if distributed.distributed_type == "fsdp":
        _check_fsdp(config, facts, problems)
    else:
        if distributed.replicas > 1:
            warnings.append("--replicas has no effect without --distributed_type fsdp")
        if not distributed.reshard_after_forward:
            warnings.append("--reshard_after_forward has no effect without --distributed_type fsdp")
    whole = method.method not in ("galore", "golore", "online_subspace_descent") or (
        method.proj_type.startswith("continuous") or distributed.distributed_type == "fsdp"
    )
    if distributed.reduce_low_rank and whole:
        warnings.append("--reduce_low_rank has no effect: this method or layout does not reduce projected gradients")


def _check_fsdp(config: Config, facts: FileFacts, problems: list[str]) -> None:
    world, replicas = config.batch.world_size, config.distributed.replicas
    if world % replicas:
        problems.append(f"--replicas {replicas} must divide the {world} processes")
    options = METHODS[config.method.method].options if config.method.method in METHODS else ()
    if "quantize" in options and config.factors.quantize:
        problems.append(
            f"--quantize {config.factors.quantize}: blocks of quantised weights cannot be divided over devices by "
            "--distributed_type fsdp: use ddp"
        )
    if "train_scaling" in options and config.factors.train_scaling:
        problems.append("--train_scaling: --distributed_type fsdp cannot divide a single number over devices: use ddp")
    if config.method.method == "switchlora" and facts.model is not None and world % replicas == 0:
        problems += _uneven_vectors(config, model_config.linear_inputs(facts.model), world // replicas)


def _uneven_vectors(config: Config, inputs: dict[str, int], devices: int) -> list[str]:
    """SwitchLoRA deals out parts of every vector: each device must have the same share of every row of A."""
    uneven: dict[int, list[str]] = {}
    for name, size in inputs.items():
        if size % devices and any(target in name for target in config.method.target_modules):
            uneven.setdefault(size, []).append(name)
    return [
        f"--distributed_type fsdp: switchlora cannot divide the {size} inputs of {names[0]}"
        f"{f' and {len(names) - 1} more' if len(names) > 1 else ''} evenly over {devices} devices: "
        "use another number of them, --replicas, or ddp"
        for size, names in uneven.items()
    ]
