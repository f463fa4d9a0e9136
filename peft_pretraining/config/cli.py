"""From the command line of `torchrun_main.py` to a checked `Config`, before torch is imported."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_pretraining.config import (
    Config,
    config_flags,
    derive_batch,
    factor_config,
    foreign_names,
    planned,
    schedule_problems,
    selection,
    validate,
    validate_folders,
)
from peft_pretraining.config.effects import warn_without_effect, warn_without_effect_in_pretraining
from peft_pretraining.config.validate_distribution import check_distribution
from peft_pretraining.flags import ConfigError, Flag, Given, one_line, parse_command_line, parse_yaml, string
from peft_pretraining.methods import METHODS
from peft_pretraining.runtime import launcher

STREAMED_LENGTH = 256
"""Tokens per sequence of streamed documents, unless told otherwise."""

DESCRIPTION = "Pre-train a LLaMA. Run under torchrun, or as a plain script for one process."


@dataclass(frozen=True)
class Launch:
    """A configuration that passed every check, and what was learnt on the way."""

    config: Config
    facts: validate.FileFacts
    identity: dict[str, Any]
    warnings: tuple[str, ...]


def all_flags() -> list[Flag]:
    training_config = Flag("training_config", string, "YAML file with any of these settings; the command line wins")
    own = [training_config, *config_flags(), *selection.SELECTORS]
    own = [dataclasses.replace(flag, foreign=foreign_names.of(flag.name)) for flag in own]
    return [*own, *planned.planned_flags()]


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Launch:
    """Parse and check everything. Raises `ConfigError` with all problems at once."""
    problems: list[str] = []
    warnings: list[str] = []
    given = _parse(argv, problems)
    planned.check_planned(given, problems)
    chosen = selection.choose(given, problems)
    method = chosen.method
    config = Config.from_settings({**_defaults(given, chosen, problems), "method": method, "optimizer": chosen.rule})
    if given.get("dataset_path") and given.get("base_dir"):
        warnings.append(f"--dataset_path wins over --base_dir {config.data.base_dir}, which has no effect")
    warnings += _replaced(given)
    warn_without_effect(given, config, warnings)
    warn_without_effect_in_pretraining(given, config, warnings)

    facts = validate.FileFacts()
    environ = os.environ if environ is None else environ
    try:
        validate.read_model(config, facts, problems, warnings)
        validate.read_data(config, facts, problems, warnings)
        config = _derive(config, given, facts, environ, problems, warnings)
        validate.check_method(config, problems, warnings)
        check_distribution(config, facts, problems, warnings)
        validate.check_data(config, facts, problems)
        validate.check_memory(config, facts, problems)
        validate_folders.check_resume_from(config, facts, problems, warnings)
        if method in METHODS:
            validate_folders.check_save_dir(config, facts, problems, warnings)
        identity = {} if problems else validate.identity_of(config, facts)
    except OSError as error:  # a file or folder that cannot even be looked at
        problems.append(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    if problems:
        raise ConfigError(problems)
    return Launch(config, facts, identity, tuple(map(one_line, warnings)))


def _parse(argv: Sequence[str], problems: list[str]) -> dict[str, Given]:
    flags = all_flags()
    hints = foreign_names.HINTS
    given = parse_command_line(
        flags, argv, prog="torchrun_main.py", description=DESCRIPTION, problems=problems, hints=hints
    )
    if "training_config" in given:
        given = {**parse_yaml(flags, given["training_config"].value, problems, hints), **given}
    return given


def _replaced(given: Mapping[str, Given]) -> list[str]:
    """Settings that were given under two names, with different values."""
    return [
        f"{item.replaced} has no effect: --{item.spelling}, which is the same setting, was given after it"
        for item in given.values()
        if item.replaced is not None
    ]


def _defaults(given: dict[str, Given], chosen: selection.Selection, problems: list[str]) -> dict[str, Any]:
    """Settings that were given, over the defaults that depend on the method and on the spelling used."""
    names = {flag.name for flag in config_flags()}
    defaults: dict[str, Any] = {}
    if "scale" in given and given["scale"].spelling == "galore_scale":
        defaults["clip_grad_norm"] = 0.0  # the code base with that spelling did not clip unless told to
    if chosen.method in METHODS:
        defaults |= METHODS[chosen.method].defaults
    defaults |= factor_config.defaults(given, chosen.method)
    if chosen.method == "full_rank" and chosen.rule == "sgd" and "beta1" in given:
        defaults["momentum"] = given["beta1"].value  # what the older scripts call it
    settings = {**defaults, **{name: item.value for name, item in given.items() if name in names}}
    if chosen.per_layer:
        if settings.get("per_layer") is False:
            problems.append(f"--optimizer {given['optimizer'].value} and --per_layer False contradict each other")
        settings["per_layer"] = True
    if settings.get("stagger_refresh") is None:
        updates_per_layer = chosen.method in METHODS and "per_layer" in METHODS[chosen.method].options
        settings["stagger_refresh"] = updates_per_layer and settings.get("per_layer", False)
    return settings


def _derive(
    config: Config,
    given: dict[str, Given],
    facts: validate.FileFacts,
    environ: Mapping[str, str],
    problems: list[str],
    warnings: list[str],
) -> Config:
    """Fill in what follows from other settings, the data and torchrun's environment."""
    world_size = launcher.world_size(environ, problems)
    if config.run.single_gpu and world_size > 1:
        problems.append(f"--single_gpu is for one process, but torchrun started {world_size}")
    max_length = config.data.max_length or (STREAMED_LENGTH if facts.shards else facts.block_length)
    before = len(problems)
    batch = derive_batch(config.replace(world_size=world_size).batch, problems)
    settings: dict[str, Any] = {**vars(batch), "max_length": max_length}
    batch_is_known = len(problems) == before

    if config.schedule.max_train_tokens is not None and batch_is_known and max_length:
        tokens_per_update = batch.total_batch_size * max_length
        updates = config.schedule.max_train_tokens // tokens_per_update
        if updates == 0:
            problems.append(
                f"--max_train_tokens {config.schedule.max_train_tokens} is less than one update's "
                f"{tokens_per_update} tokens"
            )
            return config.replace(**settings)
        if "num_training_steps" in given:
            warnings.append(f"--max_train_tokens gives {updates} updates; --num_training_steps has no effect")
        settings["num_training_steps"] = updates
    config = factor_config.resolve(config.replace(**settings), given, problems)
    if config.schedule.max_train_tokens is None or batch_is_known:
        # A warm start's schedule is shorter; it is checked again when its first update is known.
        if not config.run.warmed_up_model:
            schedule_is_wrong = schedule_problems(config.schedule, config.schedule.num_training_steps)
            problems += schedule_is_wrong
            warnings += factor_config.warnings(config) if not schedule_is_wrong else []
    return config
