"""The flags of transformers' `TrainingArguments`, and those that older versions had, as flags of ours.

Values go through `TrainingArguments`' own types, but every problem is collected instead of ending the process at the
first one (flags.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from peft_pretraining.flags import Flag, Given, boolean

ALIASES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "max_grad_norm": ("clip_grad_norm", "grad_clipping"),
    "adam_epsilon": ("adam_eps",),
    "eval_strategy": ("evaluation_strategy",),
    "use_cpu": ("no_cuda",),
    "per_device_train_batch_size": ("per_gpu_train_batch_size",),
    "per_device_eval_batch_size": ("per_gpu_eval_batch_size",),
    "dataloader_num_workers": ("num_workers", "workers"),
    "warmup_steps": ("num_warmup_steps", "warmup_ratio"),
}
"""Further spellings of a field: the package's own, and those that transformers dropped."""

WITHOUT_EFFECT: dict[str, str] = {
    "logging_dir": "transformers reads the environment variable TENSORBOARD_LOGGING_DIR instead",
    "fp16_opt_level": "mixed precision is torch's own",
    "fp16_backend": "mixed precision is torch's own",
    "half_precision_backend": "mixed precision is torch's own",
    "save_safetensors": "weights are always saved as safetensors",
    "include_inputs_for_metrics": "no metric here reads the inputs",
    "past_index": "no model here has such an output",
    "tpu_num_cores": "there is no support for TPUs",
    "ray_scope": "there is no hyper-parameter search",
}
"""Flags that transformers dropped and that can be passed over: why they have no effect."""

REFUSED: dict[str, str] = {
    "optim_args": "the method builds its optimizer: use the flags of --optimizer and --method",
    "optim_target_modules": "use --target_modules",
    "fsdp": "fine-tuning runs in one process, or under torchrun with DDP",
    "deepspeed": "fine-tuning runs in one process, or under torchrun with DDP",
    "auto_find_batch_size": "a method's state cannot be built a second time in one run: choose the batch size",
    "parallelism_config": "fine-tuning runs in one process, or under torchrun with DDP",
    "push_to_hub": "push the folder that was saved with the hub's own client",
}
"""Fields of `TrainingArguments` that cannot be combined with a training method."""

_OPTIM_OF_DEFAULT = ("adamw_torch", "adamw_torch_fused", "adamw_hf")


def _anything(text: str) -> str:
    return text


_anything.value_is_optional = True


def training_flags() -> list[Flag]:
    """Every field of `TrainingArguments` by its name and older spellings, and the flags that were dropped."""
    flags = []
    for action in HfArgumentParser(TrainingArguments)._actions:
        spellings = [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
        if action.dest == "help" or not spellings:
            continue
        name, help = spellings[0], " ".join((action.help or f"transformers: turns {action.dest} off").split())
        if name in REFUSED or name == "optim":
            flags.append(Flag(name, _anything, f"refused: {REFUSED.get(name, 'use --optimizer')}"))
            continue
        spellings += ALIASES.get(name, ())
        flags.append(Flag(name, _converter(action), help, tuple(spellings[1:])))
    flags += [Flag(name, _anything, f"without effect: {why}") for name, why in WITHOUT_EFFECT.items()]
    flags.append(Flag("overwrite_output_dir", boolean, "start over: drop the checkpoints in --output_dir"))
    flags.append(Flag("with_tracking", boolean, "log to wandb: the same as --report_to wandb"))
    flags.append(Flag("group_by_length", boolean, "the same as --train_sampling_strategy group_by_length"))
    flags.append(Flag("adafactor", boolean, "refused: use --optimizer adafactor"))
    return flags


def _converter(action: argparse.Action) -> Callable[[str], Any]:
    """What turns the text of a value into what `TrainingArguments` wants."""
    kind = action.type or str
    if kind is string_to_bool or isinstance(action.default, bool):
        return boolean

    def convert(text: str) -> Any:
        if not text:
            raise ValueError("must not be empty")
        try:
            value = kind(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise ValueError(f"must be {_KINDS.get(kind, 'a valid value')}") from None
        if action.choices and value not in action.choices:
            raise ValueError(f"must be one of {', '.join(map(str, action.choices))}")
        return value

    if action.nargs in ("+", "*"):
        return lambda text: [convert(item) for item in text.replace(",", " ").split()]
    if action.dest in _POSITIVE:
        return _positive(convert)
    return convert


_KINDS = {int: "an integer", float: "a number"}
_POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_POSITIVE += ("learning_rate", "num_train_epochs", "eval_steps", "save_steps", "logging_steps", "save_total_limit")


def _positive(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        if not (value := convert(text)) > 0 or value == float("inf"):
            raise ValueError("must be greater than 0")
        return value

    return checked


def training_values(given: dict[str, Given], problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """The keyword arguments of `TrainingArguments` that were given, translated from older spellings."""
    fields = TrainingArguments.__dataclass_fields__
    values: dict[str, Any] = {name: item.value for name, item in given.items() if name in fields}
    for name in [name for name in given if name.startswith("no_") and name[3:] in fields]:
        values[name[3:]] = not given[name].value
    for name, why in WITHOUT_EFFECT.items():
        if name in given:
            warnings.append(f"--{given[name].spelling} has no effect: {why}")
    for name, why in REFUSED.items():
        if name in given and str(given[name].value).lower() not in ("", "false", "none"):
            problems.append(f"--{given[name].spelling}: {why}")
        values.pop(name, None)
    if (optim := values.pop("optim", None)) is not None and optim not in _OPTIM_OF_DEFAULT:
        problems.append(f"--optim {optim}: the method builds its optimizer; use --optimizer")
    if "adafactor" in given and given["adafactor"].value:
        problems.append("--adafactor: use --optimizer adafactor")
    if "group_by_length" in given and given["group_by_length"].value:
        values["train_sampling_strategy"] = "group_by_length"
    if "with_tracking" in given and given["with_tracking"].value:
        if values.get("report_to", "wandb") not in ("wandb", "all"):
            problems.append(f"--with_tracking logs to wandb, but --report_to is {values['report_to']}")
        values.setdefault("report_to", "wandb")
    values.setdefault("report_to", "none")
    for name in ("max_grad_norm", "weight_decay", "warmup_steps"):
        if name in given and given[name].value < 0:
            problems.append(f"--{given[name].spelling} must be at least 0, got {given[name].value:g}")
    # `--warmup_ratio` has become a `--warmup_steps` below 1.
    if "warmup_steps" in given and given["warmup_steps"].spelling == "warmup_ratio" and values["warmup_steps"] >= 1:
        problems.append(f"--warmup_ratio must be below 1, got {values['warmup_steps']:g}")
    return values
