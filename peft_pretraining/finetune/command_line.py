"""The flags of a fine-tuning command: the methods', transformers' and the task's own, each once. No torch.

What sets one entry point's command line apart is its `EntryPoint`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from peft_pretraining.config import config_flags, legacy
from peft_pretraining.config.role_config import RoleConfig
from peft_pretraining.finetune.run_settings import RunSettings
from peft_pretraining.finetune.training_flags import training_flags
from peft_pretraining.flags import TRAINING_CONFIG, Flag, ParsedFlag, section_flags, unsupported
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.rule_settings import RULES

T = TypeVar("T")

_SHARED_RULE_SETTINGS = ("adam_beta1", "adam_beta2", "adam_eps")
"""Settings of update rules that are fields of `TrainingArguments`."""


@dataclass(frozen=True)
class EntryPoint(Generic[T]):
    """What sets one entry point's command line apart."""

    task_type: type[T]
    """A dataclass of `flags.setting` fields: the task's own settings."""
    prog: str
    description: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of any kind, by their flags' names, that the entry point sets differently; a value that a method has as
    its own default wins over them."""
    check_task: Callable[[T, Mapping[str, ParsedFlag], list[str], list[str]], None] | None = None
    """Is given the task's settings, what was given, and the lists of problems and warnings to add to."""
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Flags of older scripts -> why they are refused."""
    passed_over: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Flags of older scripts -> why they have no effect."""


def method_setting_names() -> set[str]:
    """Settings of methods, update rules and roles that fine-tuning has under the same name as pre-training."""
    of_methods = {name for spec in METHODS.values() for name in (*spec.own, "method")}
    of_rules = {name for rule in RULES.values() for name in rule.reads}
    of_roles = {item.name for item in dataclasses.fields(RoleConfig)}
    return (of_methods | of_rules | of_roles | {"optimizer"}) - set(_SHARED_RULE_SETTINGS)


def finetuning_flags(entry: EntryPoint[Any]) -> list[Flag]:
    """All flags of an entry point. A task's own flag takes the place of one of `TrainingArguments` with its name."""
    own = [
        TRAINING_CONFIG,
        *_grouped("model and task", section_flags(entry.task_type)),
        *_grouped("run", section_flags(RunSettings)),
        *(flag for flag in config_flags() if flag.name in method_setting_names()),
    ]
    others = [
        *_grouped(legacy.GROUP, (*legacy.SELECTORS, *legacy.FINETUNING_SELECTORS)),
        *_grouped(legacy.GROUP, unsupported.refused_flags(entry.refused)),
        *_grouped(legacy.GROUP, unsupported.passed_over_flags(entry.passed_over)),
    ]
    taken = {spelling for flag in (*own, *others) for spelling in flag.spellings}
    trainer = [
        dataclasses.replace(flag, aliases=tuple(alias for alias in flag.aliases if alias not in taken))
        for flag in training_flags()
        if flag.name not in taken
    ]
    return [
        dataclasses.replace(
            flag, default=entry.defaults.get(flag.name, flag.default), help=_HELP.get(flag.name, flag.help)
        )
        for flag in (*own, *trainer, *others)
    ]


_HELP = {
    "target_modules": "linear layers whose dotted name contains one of these (default: as --lora_all_modules says)",
    "adam_lr": "peak rate of embeddings, head, norms and what else the method leaves as it is (default: "
    "--learning_rate)",
    "head_lr": "peak rate of the head, a classifier's too, but for biases (default: --adam_lr)",
    "norm_weight_decay": "decay of norms and biases (default: none, whatever --weight_decay is)",
}


def _grouped(group: str, flags: Iterable[Flag]) -> list[Flag]:
    return [dataclasses.replace(flag, group=group) for flag in flags]


def selector_names() -> set[str]:
    """Flags of older scripts that choose a method."""
    return {flag.name for flag in (*legacy.SELECTORS, *legacy.FINETUNING_SELECTORS)}
