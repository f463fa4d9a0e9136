"""What the settings of a run come to on the device that it has."""

from __future__ import annotations

from dataclasses import replace

import torch

from peft_pretraining.config import Config
from peft_pretraining.config.cli import ParsedArgs
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS
from peft_pretraining.models.compiled import why_not
from peft_pretraining.training.tracking import log


def for_device(launch: ParsedArgs, device_type: str) -> ParsedArgs:
    """With the precision that an `auto` means on this device, and with what `--compile auto` and `--lean_layers auto`
    do: these are recorded, and a run keeps them wherever it goes."""
    precision = launch.config.resolved_precision(device_type)
    model = launch.config.model
    settings = {"precision": precision.name, "compile": compile_or_not(model.compile, device_type)}
    if model.lean_layers == "off" and precision.casts and launch.config.precision.precision == "auto":
        log.warning("without effect with --precision %s, which auto means here: --lean_layers off", precision.name)
    settings["lean_layers"] = lean_or_not(model.lean_layers, device_type)
    if precision.weight_dtype == "bfloat16":
        settings["state_dtype"] = precision.state_format
    if (of_method := METHODS[launch.config.method.method].for_device) is not None:
        settings |= of_method(launch.config, device_type)
    return replace(launch, config=launch.config.replace(**settings))


def compile_or_not(asked: str, device_type: str) -> str:
    """`on` or `off`. Raises `ConfigError` where layers are to be compiled, and nothing here can."""
    if asked == "off" or (asked == "auto" and device_type != "cuda"):
        return "off"
    reason = why_not(torch.device(device_type))
    if reason is None:
        return "on"
    if asked == "on":
        raise ConfigError([f"--compile on: {reason}; --compile off runs without"])
    log.warning("layers are not compiled: %s", reason)
    return "off"


def lean_or_not(asked: str, device_type: str) -> str:
    """`on` or `off`: where nothing is said, the CPU computes to the last digit what transformers' modules do."""
    if asked == "auto":
        return "on" if device_type == "cuda" else "off"
    return asked


def set_matmul_precision(config: Config, device: torch.device) -> None:
    """How a model with float32 products multiplies on CUDA: by default in TF32, several times as fast. The optimizer
    keeps bases and merges out of it (`optim.tensors.full_precision`). On the CPU products are always in full."""
    asked = config.precision.matmul_precision
    if device.type == "cuda":
        torch.set_float32_matmul_precision(asked or "high")
    elif asked not in (None, "highest"):
        log.warning("without effect on the CPU, whose float32 products are in full: --matmul_precision")
