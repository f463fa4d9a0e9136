"""From a fine-tuning command line to checked settings: the method's, transformers' and the task's own.

One flat set of flags: the fields of `MethodConfig` and `FactorConfig` with the selectors of selection.py, those of
`TrainingArguments` (training_flags.py), those here, and the fields of the task's dataclass, which the entry point
passes. Every problem is reported at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available

from peft_pretraining import factor_config, selection, validate
from peft_pretraining.cli import warn_without_effect
from peft_pretraining.config import Config, MethodConfig, OptimizerConfig
from peft_pretraining.factor_config import FactorConfig
from peft_pretraining.finetune.training_flags import training_flags, training_values
from peft_pretraining.flags import ConfigError, Flag, Given, boolean, comma_separated, integer, parse_command_line
from peft_pretraining.methods import METHODS

T = TypeVar("T")

_OWN_OPTIMIZER_FIELDS = ("optimizer", "beta1", "momentum", "dampening")
"""Of `OptimizerConfig`; the others are fields of `TrainingArguments`."""


@dataclass(frozen=True)
class FineTuning(Generic[T]):
    """What a command asks for."""

    config: Config
    """The method and everything it reads; `num_training_steps` and `target_modules` are settled by `MethodTrainer`."""
    training: TrainingArguments
    task: T
    lora_all_modules: bool = False
    """Target every linear layer of the blocks, not only queries and values."""
    target_modules_given: bool = False
    seeds: tuple[int, ...] = ()
    """Run once for each of these, in a subfolder of the output folder."""
    overwrite_output_dir: bool = False
    warnings: tuple[str, ...] = ()
    given: Mapping[str, Given] = dataclasses.field(default_factory=dict)

    def with_seed(self, seed: int, output_dir: str) -> FineTuning[T]:
        """The run of one of the seeds."""
        training = dataclasses.replace(self.training, seed=seed, output_dir=output_dir)
        return dataclasses.replace(self, config=self.config.replace(seed=seed), training=training, seeds=())


def _seeds(text: str) -> tuple[int, ...]:
    if not (seeds := tuple(integer(item) for item in comma_separated(text))):
        raise ValueError("must be integers, comma-separated")
    if len(set(seeds)) < len(seeds):
        raise ValueError("must not name a seed twice")
    return seeds


def dataclass_flags(*types: type, only: Sequence[str] | None = None) -> list[Flag]:
    """One flag for every field made by `flags.setting`."""
    return [
        Flag(item.name, item.metadata["convert"], item.metadata["help"], item.metadata["aliases"])
        for section in types
        for item in dataclasses.fields(section)
        if item.metadata and (only is None or item.name in only)
    ]


def finetuning_flags(task_type: type) -> list[Flag]:
    """All flags of an entry point. A task's own flag takes the place of one of `TrainingArguments` with its name."""
    own = [
        *dataclass_flags(MethodConfig, FactorConfig),
        *dataclass_flags(OptimizerConfig, only=_OWN_OPTIMIZER_FIELDS),
        *selection.SELECTORS,
        *selection.FINETUNING_SELECTORS,
        *dataclass_flags(task_type),
        Flag("lora_all_modules", boolean, "target all linear layers of the blocks (default: queries and values)"),
        Flag("seeds", _seeds, "run once per seed, comma-separated, and report mean and standard deviation"),
    ]
    taken = {spelling for flag in own for spelling in flag.spellings}
    rest = [
        dataclasses.replace(flag, aliases=tuple(alias for alias in flag.aliases if alias not in taken))
        for flag in training_flags()
        if flag.name not in taken
    ]
    return own + rest


def load(
    argv: Sequence[str],
    task_type: type[T],
    *,
    prog: str,
    description: str,
    defaults: Mapping[str, Any] | None = None,
    check_task: Callable[[T, Mapping[str, Given], list[str], list[str]], None] | None = None,
) -> FineTuning[T]:
    """Parse and check a command line. Raises `ConfigError` with all problems at once.

    defaults: settings of any kind, by their flags' names, that the entry point sets differently; a value that a method
        has as its own default wins over them.
    check_task: is given the task's settings, what was given, and the lists of problems and warnings to add to.
    """
    problems: list[str] = []
    warnings: list[str] = []
    given = parse_command_line(finetuning_flags(task_type), argv, prog=prog, description=description, problems=problems)
    defaults = dict(defaults or {})
    names = {item.name for item in dataclasses.fields(task_type)}
    own = {name: value for name, value in defaults.items() if name in names}
    task = task_type(**{**own, **{name: item.value for name, item in given.items() if name in names}})
    if check_task is not None:
        check_task(task, given, problems, warnings)

    values = training_values(given, problems, warnings)
    fields = TrainingArguments.__dataclass_fields__
    values = {**{name: value for name, value in defaults.items() if name in fields}, **values}
    training = _training_arguments(values, given, problems, warnings)
    config = _config(given, defaults, training, problems, warnings)
    if problems:
        raise ConfigError(problems)
    return FineTuning(
        config,
        training,
        task,
        lora_all_modules="lora_all_modules" in given and given["lora_all_modules"].value,
        target_modules_given="target_modules" in given,
        seeds=given["seeds"].value if "seeds" in given else (),
        overwrite_output_dir="overwrite_output_dir" in given and given["overwrite_output_dir"].value,
        warnings=tuple(warnings),
        given=given,
    )


def _training_arguments(
    values: dict[str, Any], given: Mapping[str, Given], problems: list[str], warnings: list[str]
) -> TrainingArguments | None:
    """None if there is a problem with them."""
    import torch

    if "output_dir" not in values:
        problems.append("--output_dir is required")
    if not values.get("do_train") and not values.get("do_eval") and not values.get("do_predict"):
        values["do_train"] = values["do_eval"] = True
    has_accelerator = torch.accelerator.is_available() or is_torch_xla_available()
    if values.get("use_cpu") or not has_accelerator:
        for name in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
            if values.pop(name, False):
                warnings.append(f"--{name}: there is no accelerator; float32 is used")
        values["use_cpu"] = True  # accelerate divides the work of processes on CPUs only when told so
        values.setdefault("dataloader_pin_memory", False)
    values.setdefault("ddp_broadcast_buffers", False)  # every process has the same; factors' pools must not travel
    if "seeds" in given and "seed" in given:
        warnings.append("--seed has no effect beside --seeds")
    try:
        training = TrainingArguments(**{"output_dir": "unused", **values})
    except (ValueError, TypeError, ImportError, KeyError) as error:
        problems.append(f"transformers' TrainingArguments: {' '.join(str(error).split())}")
        return None
    if training.n_gpu > 1:
        warnings.append(f"one of {training.n_gpu} devices is used: start one process for each with torchrun")
        training._n_gpu = 1  # nn.DataParallel would run copies of the layers, which the methods do not know of
    return training


def _config(
    given: dict[str, Given],
    defaults: Mapping[str, Any],
    training: TrainingArguments | None,
    problems: list[str],
    warnings: list[str],
) -> Config:
    """The method's settings; what `TrainingArguments` has, too, is copied from there."""
    chosen = selection.choose(given, problems)
    names = {
        *(item.name for item in dataclasses.fields(MethodConfig)),
        *(item.name for item in dataclasses.fields(FactorConfig)),
        *_OWN_OPTIMIZER_FIELDS,
    }
    settings: dict[str, Any] = {name: value for name, value in defaults.items() if name in names}
    settings |= METHODS[chosen.method].defaults if chosen.method in METHODS else {}
    settings |= {k: v for k, v in factor_config.defaults(given, chosen.method).items() if k in names}
    settings |= {name: item.value for name, item in given.items() if name in names}
    settings |= {"method": chosen.method, "optimizer": chosen.rule}
    settings["per_layer"] = settings.get("per_layer", False) or chosen.per_layer
    if settings.get("stagger_refresh") is None:
        reads_per_layer = chosen.method in METHODS and "per_layer" in METHODS[chosen.method].options
        settings["stagger_refresh"] = reads_per_layer and settings["per_layer"]
    if training is not None:
        settings |= _shared_settings(given, training)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = Config.from_settings({**settings, "world_size": world_size})
    if chosen.method in METHODS:
        config = factor_config.resolve(config, given, problems)
        validate.check_method(config, problems, warnings)
        _check_possible(config, training, problems)
        warn_without_effect(given, config, warnings)
    return config


def _shared_settings(given: Mapping[str, Given], training: TrainingArguments) -> dict[str, Any]:
    """Settings that `TrainingArguments` has under a name of its own."""
    shared = {
        **{"lr": training.learning_rate, "weight_decay": training.weight_decay, "seed": training.seed},
        **{"adam_beta1": training.adam_beta1, "adam_beta2": training.adam_beta2},
        **{"clip_grad_norm": training.max_grad_norm, "gradient_accumulation": training.gradient_accumulation_steps},
    }
    if "adam_epsilon" in given:  # otherwise the method's default
        shared["adam_eps"] = training.adam_epsilon
    return shared


def _check_possible(config: Config, training: TrainingArguments | None, problems: list[str]) -> None:
    """What the methods can do in pre-training but not here."""
    method, name = config.method, config.method.method
    if method.refresh_accumulation > 1 and "refresh_accumulation" in METHODS[name].options:
        problems.append(
            f"--refresh_accumulation {method.refresh_accumulation}: fine-tuning has no further batches for a refresh"
        )
    if config.optimizer.optimizer == "adam_zero":
        problems.append("--optimizer adam_zero: sharded optimizer states are for pre-training")
    if config.factors.lora_only:
        problems.append("--lora_only drops the weights that fine-tuning starts from")
    per_layer = method.per_layer and "per_layer" in METHODS[name].options
    if per_layer and config.batch.world_size > 1:
        problems.append("per-layer updates: fine-tuning has them in one process only")
    if training is not None and training.fp16 and (per_layer or name == "golore_adapter"):
        problems.append(f"--fp16: {name} takes gradients before they are unscaled; use --bf16")
