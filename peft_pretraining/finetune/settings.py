"""From a fine-tuning command line to checked settings: the method's, transformers' and the task's own.

The flags are those of command_line.py. Every problem is reported at once, before torch and transformers are imported;
what transformers itself finds wrong with the values comes after that.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from peft_pretraining.config import Config, legacy, method_help, method_settings
from peft_pretraining.config.effects import warn_without_effect
from peft_pretraining.finetune.command_line import EntryPoint, finetuning_flags, method_setting_names, selector_names
from peft_pretraining.finetune.run_settings import RunSettings
from peft_pretraining.finetune.training_flags import training_defaults, training_values
from peft_pretraining.flags import (
    ConfigError,
    ParsedFlag,
    read_flags,
    unsupported,
)
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.rule_settings import RULES
from peft_pretraining.runtime import launcher

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import TrainingArguments

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class FineTuning(RunSettings, Generic[T]):
    """What a command asks for."""

    config: Config
    """The method and everything it reads; `num_training_steps` and `target_modules` are settled by `MethodTrainer`."""
    training: TrainingArguments
    task: T
    target_modules_given: bool = False
    warnings: tuple[str, ...] = ()
    given: Mapping[str, ParsedFlag] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Every field of `TrainingArguments` as it was asked for, whatever this machine makes of it."""

    @property
    def output_dir(self) -> Path:
        """The run's folder, which every command line has."""
        assert self.training.output_dir is not None
        return Path(self.training.output_dir)

    def with_seed(self, seed: int, output_dir: str) -> FineTuning[T]:
        """The run of one of the seeds."""
        training = dataclasses.replace(self.training, seed=seed, output_dir=output_dir)
        return dataclasses.replace(self, config=self.config.replace(seed=seed), training=training, seeds=())


@dataclass(frozen=True)
class Checked(Generic[T]):
    """A command line that is right as far as can be told without torch and transformers."""

    config: Config
    task: T
    values: dict[str, Any]
    """The keyword arguments of `TrainingArguments`."""
    given: Mapping[str, ParsedFlag]
    warnings: tuple[str, ...]


def check(argv: Sequence[str], entry: EntryPoint[T]) -> Checked[T]:
    """Parse and check a command line, without torch. Raises `ConfigError` with all problems at once."""
    problems: list[str] = []
    warnings: list[str] = []
    flags = finetuning_flags(entry)
    method_help.exit_with_help(argv, flags, entry.prog)
    given = read_flags(
        flags,
        argv,
        prog=entry.prog,
        description=f"{entry.description}\n\n{method_help.NOTE}",
        problems=problems,
        warnings=warnings,
    )
    unsupported.check_refused(given, entry.refused, problems)
    unsupported.warn_passed_over(given, entry.passed_over, warnings)
    names = {item.name for item in dataclasses.fields(entry.task_type)}
    own = {name: value for name, value in entry.defaults.items() if name in names}
    task = entry.task_type(**{**own, **{name: item.value for name, item in given.items() if name in names}})
    if entry.check_task is not None:
        entry.check_task(task, given, problems, warnings)

    values = training_values(given, problems, warnings)
    fields = training_defaults()
    values = {**{name: value for name, value in entry.defaults.items() if name in fields}, **values}
    if (output_dir := values.get("output_dir")) is None:
        problems.append("--output_dir is required")
    elif os.path.exists(output_dir) and not os.path.isdir(output_dir):
        problems.append(f"--output_dir {output_dir} is not a folder")
    if not values.get("do_train") and not values.get("do_eval") and not values.get("do_predict"):
        values["do_train"] = values["do_eval"] = True
    if "seeds" in given and "seed" in given:
        warnings.append("--seed has no effect beside --seeds")
    config = _config(given, entry.defaults, {**fields, **values}, problems, warnings)
    if problems:
        raise ConfigError(problems)
    return Checked(config, task, values, given, tuple(warnings))


def load(argv: Sequence[str], entry: EntryPoint[T]) -> FineTuning[T]:
    """Parse and check a command line. Raises `ConfigError` with all problems at once."""
    checked = check(argv, entry)
    given, warnings = checked.given, list(checked.warnings)
    problems: list[str] = []
    training = _training_arguments(dict(checked.values), problems, warnings)
    if training is not None and training.fp16 and not problems:
        _check_fp16(checked.config, problems)
    if training is None or problems:
        raise ConfigError(problems)
    given_or_default = {**entry.defaults, **{name: item.value for name, item in given.items()}}
    names = (item.name for item in dataclasses.fields(RunSettings))
    return FineTuning(
        **{name: given_or_default[name] for name in names if name in given_or_default},
        config=checked.config,
        training=training,
        task=checked.task,
        target_modules_given="target_modules" in given,
        warnings=tuple(warnings),
        given=given,
        values={**training_defaults(), **checked.values},
    )


def _training_arguments(values: dict[str, Any], problems: list[str], warnings: list[str]) -> TrainingArguments | None:
    """None if there is a problem with them."""
    import torch
    from transformers import TrainingArguments
    from transformers.utils import is_torch_xla_available

    has_accelerator = torch.accelerator.is_available() or is_torch_xla_available()
    if values.get("use_cpu") or not has_accelerator:
        for name in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
            if values.pop(name, False):
                warnings.append(f"--{name}: there is no accelerator; float32 is used")
        values["use_cpu"] = True  # accelerate divides the work of processes on CPUs only when told so
        values.setdefault("dataloader_pin_memory", False)
    values.setdefault("ddp_broadcast_buffers", False)  # every process has the same; factors' pools must not travel
    if os.environ.get("WORLD_SIZE", "1") == "1" and values.pop("ddp_backend", None) is not None:
        warnings.append("--ddp_backend has no effect without torchrun")
    try:
        training = TrainingArguments(**values)
    except Exception as error:  # its checks, accelerate's and the files that values name: each has its own exceptions
        problems.append(f"transformers' TrainingArguments: {' '.join(str(error).split()) or type(error).__name__}")
        return None
    if training.n_gpu > 1:
        warnings.append(f"one of {training.n_gpu} devices is used: start one process for each with torchrun")
        training._n_gpu = 1  # nn.DataParallel would run copies of the layers, which the methods do not know of
    return training


def _config(
    given: dict[str, ParsedFlag],
    defaults: Mapping[str, Any],
    values: Mapping[str, Any],
    problems: list[str],
    warnings: list[str],
) -> Config:
    """The method's settings; what `TrainingArguments` has, too, is copied from its `values`."""
    chosen = legacy.choose(given, problems)
    names = method_setting_names()
    of_methods = {name: item for name, item in given.items() if name in names | selector_names()}
    own = {name: value for name, value in defaults.items() if name in names}
    settings, read = method_settings.settle(of_methods, chosen, own, problems)
    settings = {name: value for name, value in settings.items() if name in names | {"adam_eps"}}
    config = Config.from_settings({**settings, **_shared_settings(given, values), "world_size": _world_size(problems)})
    if chosen.method in METHODS:
        config = method_settings.resolve(config, given)
        method_settings.check(config, of_methods, problems, warnings)
        _check_possible(config, problems)
        warn_without_effect(given, config, read, warnings)
    return config


def _world_size(problems: list[str]) -> int:
    """How many processes torchrun started; 1 without it."""
    problems += launcher.launcher_problems(os.environ)
    return launcher.world_size(os.environ, [])


def _shared_settings(given: Mapping[str, ParsedFlag], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that `TrainingArguments` has under a name of its own."""
    same = {name: values[name] for name in ("weight_decay", "seed", "adam_beta1", "adam_beta2")}
    own_epsilon = {"adam_eps": values["adam_epsilon"]} if "adam_epsilon" in given else {}  # or the method's default
    return {
        **same,
        **own_epsilon,
        "lr": values["learning_rate"],
        "clip_grad_norm": values["max_grad_norm"],
        "gradient_accumulation": values["gradient_accumulation_steps"],
    }


def _check_possible(config: Config, problems: list[str]) -> None:
    """What the methods can do in pre-training but not here."""
    spec, rule = METHODS[config.method.method], RULES.get(config.optimizer.optimizer)
    if not spec.allows.fine_tuning:
        problems.append(f"--method {spec.name} does not declare that it can fine-tune models")
    if spec.check_fine_tuning:
        spec.check_fine_tuning(config, problems)
    if rule is not None and not rule.fine_tuning:
        problems.append(f"--optimizer {rule.name}: sharded optimizer states are for pre-training")
    if config.per_layer and config.batch.world_size > 1:
        problems.append("per-layer updates: fine-tuning has them in one process only")


def _check_fp16(config: Config, problems: list[str]) -> None:
    spec = METHODS[config.method.method]
    if config.per_layer or not spec.allows.fp16:
        problems.append(f"--fp16: {spec.name} takes gradients before they are unscaled; use --bf16")
