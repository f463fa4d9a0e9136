"""From the command line of `torchrun_main.py` to a checked `Config`, before torch is imported."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_pretraining.config import (
    Config,
    check_precision,
    check_sharding,
    config_flags,
    derive_batch,
    evaluation_sets,
    foreign_names,
    legacy,
    method_help,
    method_settings,
    recorded,
    recorded_precision,
    schedule_problems,
    tracking_config,
    validate,
    validate_folders,
)
from peft_pretraining.config.effects import warn_without_effect, warn_without_effect_in_pretraining
from peft_pretraining.flags import TRAINING_CONFIG, ConfigError, Flag, ParsedFlag, one_line, read_flags
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.rule_settings import RULES
from peft_pretraining.runtime import launcher

STREAMED_LENGTH = 256
"""Tokens per sequence of streamed documents, unless told otherwise."""

PROG = "torchrun_main.py"
DESCRIPTION = f"Pre-train a LLaMA. Run under torchrun, or as a plain script for one process.\n\n{method_help.NOTE}"


@dataclass(frozen=True)
class ParsedArgs:
    """A configuration that passed every check, and what was learnt on the way."""

    config: Config
    facts: validate.FileFacts
    identity: dict[str, Any]
    warnings: tuple[str, ...]
    names_layout: bool = False
    """Whether --distributed_type was given: then one process of torchrun's is distributed, too."""


def all_flags() -> list[Flag]:
    selectors = [dataclasses.replace(flag, group=legacy.GROUP) for flag in legacy.SELECTORS]
    own = [TRAINING_CONFIG, *config_flags(), *selectors]
    values = {"method": tuple(METHODS), "optimizer": tuple(RULES)}
    own = [
        dataclasses.replace(flag, foreign=foreign_names.of(flag.name), values=values.get(flag.name, ())) for flag in own
    ]
    return [*own, *legacy.unsupported_flags()]


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None, here: bool = True) -> ParsedArgs:
    """Parse and check everything. Raises `ConfigError` with all problems at once.

    `here`: the run is to be on this machine, so that its memory, the run's folder and data that is not named matter.
    """
    problems: list[str] = []
    warnings: list[str] = []
    flags = all_flags()
    method_help.exit_with_help(argv, flags, PROG)
    given = read_flags(
        flags,
        argv,
        prog=PROG,
        description=DESCRIPTION,
        problems=problems,
        warnings=warnings,
        hints=foreign_names.HINTS,
    )
    legacy.check_unsupported(given, problems)
    chosen = legacy.choose(given, problems)
    settings, read = method_settings.settle(given, chosen, {}, problems)
    config = check_precision.settle(Config.from_settings(settings), problems)
    config = recorded.keep(recorded_precision.keep(config, given, problems), given)
    if given.get("dataset_path") and given.get("base_dir"):
        warnings.append(f"--dataset_path wins over --base_dir {config.data.base_dir}, which has no effect")
    warn_without_effect(given, config, read, warnings)
    warn_without_effect_in_pretraining(given, config, warnings)

    facts = validate.FileFacts()
    environ = os.environ if environ is None else environ
    try:
        validate.read_model(config, facts, problems, warnings)
        if here or config.data.dataset_path:
            validate.read_data(config, facts, problems, warnings)
        config = _derive(config, given, facts, environ, problems, warnings)
        method_settings.check(config, given, problems, warnings)
        check_precision.check(config, problems, warnings)
        check_sharding.check(config, facts, problems, warnings)
        validate.check_data(config, facts, problems)
        validate.check_document_mask(config, facts, problems, warnings)
        evaluation_sets.check(config, facts, problems, warnings)
        tracking_config.check(config, problems)
        if here:
            validate.check_memory(config, facts, problems)
            validate_folders.check_resume_from(config, facts, problems, warnings)
        if here and chosen.method in METHODS:
            validate_folders.check_save_dir(config, facts, problems, warnings)
        identity = {} if problems else validate.identity_of(config, facts)
    except OSError as error:  # a file or folder that cannot even be looked at
        problems.append(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    if problems:
        raise ConfigError(problems)
    return ParsedArgs(config, facts, identity, tuple(map(one_line, warnings)), "distributed_type" in given)


def _derive(
    config: Config,
    given: dict[str, ParsedFlag],
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
        assert batch.total_batch_size is not None, "it was derived"
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
    if config.schedule.scheduler == "wsd" and "min_lr_ratio" not in given:
        settings["min_lr_ratio"] = 0.0
    config = method_settings.resolve(config.replace(**settings), given)
    if config.schedule.max_train_tokens is None or batch_is_known:
        # A warm start's schedule is shorter; it is checked again when its first update is known.
        if not config.run.warmed_up_model:
            schedule_is_wrong = schedule_problems(config.schedule, config.schedule.num_training_steps)
            problems += schedule_is_wrong
            spec = METHODS.get(config.method.method)
            if spec and spec.check_schedule and not schedule_is_wrong:
                spec.check_schedule(config, warnings)
    return config
