"""The model that a run trains: with a method's layers, distributed, and built without ever being whole twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_pretraining.config import Config
from peft_pretraining.distributed import ProcessGroup, Sharding, add_up_in_float32, parallelize, shard
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.causal_lm import LlamaForCausalLM, can_fuse_loss
from peft_pretraining.models.compiled import Compilation, CompiledFunction, compilation_of, compile_layers
from peft_pretraining.models.compute_dtype import is_norm
from peft_pretraining.models.fused_loss import fused_token_loss, softmax_loss, softmax_loss_
from peft_pretraining.models.liger_loss import liger_loss
from peft_pretraining.models.llama import build_model, drawn_together, materialize, materialize_layers, torch_dtype
from peft_pretraining.nn import LowRankLinear, low_rank_layers, replace_linear
from peft_pretraining.optim.state.gradient_owner import GradientOwner


def distributed_model(
    config: Config,
    shape: dict[str, Any],
    method: TrainingMethod,
    group: ProcessGroup,
    weights_from: str | None = None,
) -> PreTrainedModel:
    """The training model, with its layers changed and its parameters sharded as the settings say.

    `shape` is the model JSON's. Weights that are drawn get their memory last, and those of layers that the method
    replaces a few at a time, so that a device never holds more than its part of them, and the host no more than that
    and one decoder layer; with `weights_from`, a folder or hub name, they are read.
    """
    distributed, seed = config.distributed, config.run.seed
    sharded = distributed.distributed_type == "fsdp" and group.is_collective
    # Sharding a model moves it to the devices, layer by layer.
    made_on = torch.device("cpu") if sharded else group.device
    model = build_model(
        config.model, shape, weights_from, group.device, precision=config.resolved_precision(group.device.type)
    )
    if type(method).convert is not TrainingMethod.convert:  # which may read any of the weights
        materialize(model, made_on, seed)
        model = cast(PreTrainedModel, method.convert(model))
        replacements: dict[str, Callable[[nn.Linear], LowRankLinear]] = {}
    else:
        replacements = method.replacements(model)

    def replace_within(name: str) -> None:
        within = [layer for layer in replacements if layer.startswith(f"{name}." if name else "")]
        for layers in drawn_together(model, within):
            materialize_layers(model, layers, made_on, seed)
            for layer in layers:
                replace_linear(model, layer, replacements.pop(layer))

    if sharded:
        precision = config.resolved_precision(group.device.type)
        settings = Sharding(
            distributed.replicas,
            distributed.reshard_after_forward,
            method.sharded_dimension,
            *((torch_dtype(precision.compute_dtype), is_norm) if precision.casts else ()),
        )
        shard(model, group, settings, before=replace_within, after=_follow_sharding)
    else:
        replace_within("")
    materialize(model, group.device, seed)
    compiles = config.model.compile == "on" and group.device.type != "meta"
    compilation = compile_layers(model) if compiles else None
    choose_loss(model, config.model.fused_loss, group.device, compilation)
    return model


def choose_loss(
    model: PreTrainedModel, fused: str, device: torch.device, compilation: Compilation | None = None
) -> None:
    """Let the model make its loss as `--fused_loss` says. Raises `ConfigError` where it is asked for what it cannot.

    With `compilation` what stands between the head's products is compiled, too, which makes of it what liger-kernel's
    kernels are, without their waits for the device.
    """
    possible = can_fuse_loss(model)
    if fused in ("on", "liger") and not possible:
        raise ConfigError(
            [f"--fused_loss {fused} needs a head that is a matrix alone, without bias and without factors"]
        )
    if not possible or fused == "off" or (fused == "auto" and device.type != "cuda"):
        return
    causal_lm = cast(LlamaForCausalLM, model)
    causal_lm.fused_loss = True
    liger = None
    if device.type == "cuda" and (fused == "liger" or (fused == "auto" and compilation is None)):
        liger = liger_loss()
    if liger is not None:
        causal_lm.head_loss, causal_lm.head_loss_by = liger, "liger-kernel"
    elif fused == "liger":
        raise ConfigError(["--fused_loss liger needs CUDA and liger-kernel with accum_dtype; on does without"])
    elif compilation is not None:
        block_loss = CompiledFunction(softmax_loss, softmax_loss_, compilation)
        causal_lm.head_loss = partial(fused_token_loss, block_loss=block_loss)
        causal_lm.head_loss_by = "compiled blocks of logits"


def describe_speed(model: nn.Module) -> str:
    """How layers and loss are computed, in words."""
    layers = "run eagerly" if compilation_of(model) is None else "are compiled at their first use"
    fused = getattr(model, "fused_loss", False)
    return f"layers {layers}, {f'the loss is made by {model.head_loss_by}' if fused else 'head and loss are apart'}"


def _follow_sharding(module: nn.Module) -> None:
    for layer in low_rank_layers(module).values():
        layer.follow_sharding()


def reduced_model(
    config: Config,
    group: ProcessGroup,
    model: nn.Module,
    gradients: GradientOwner,
) -> nn.Module:
    """The module whose backward pass leaves gradients averaged over the ranks, or their projections.

    Per-layer updates average them themselves: a gradient is gone before DDP could. Beside 16-bit weights, gradients of
    several micro-batches add up in float32, unless everything is to be as published.
    """
    precision = config.resolved_precision(group.device.type)
    published = precision.state_format == "published" and precision.rounding == "nearest"
    wide = precision.weight_dtype == "bfloat16" and not published
    sharded = config.distributed.distributed_type == "fsdp" and group.is_collective  # FSDP2 adds up in float32 itself
    several = (config.batch.gradient_accumulation or 1) > 1  # one product has no digits for more than 16 bits
    narrow_sums = config.per_layer and config.precision.gradient_sum_dtype != "float32"
    if wide and several and not narrow_sums and not sharded and (config.per_layer or not group.is_collective):
        add_up_in_float32(model)
    if config.per_layer:
        return model
    allowed = METHODS[config.method.method].allows.projected_gradient
    low_rank = allowed and config.distributed.reduce_low_rank is not False and group.is_collective
    return parallelize(model, group, gradients.low_rank_reduction() if low_rank else None, wide, gradients.leaves)
