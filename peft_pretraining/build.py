"""From a checked configuration to a run: every object, in the order of their dependencies."""

from __future__ import annotations

import atexit
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from peft_pretraining import run_dir
from peft_pretraining.build_data import open_data
from peft_pretraining.checkpoint import Checkpointer, SaveFailed, TrainState, starting_counters, versions
from peft_pretraining.cli import Launch
from peft_pretraining.config import DEFAULT_TOKENIZER, Config, schedule_problems
from peft_pretraining.data.blocks import end_workers
from peft_pretraining.data.data import Data
from peft_pretraining.data.shards import DataError
from peft_pretraining.distributed import ProcessGroup, Sharding, parallelize, shard
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import load_method
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.llama import build_model, materialize, resolve_dtype
from peft_pretraining.profiling import Profiler
from peft_pretraining.tracking import Tracker, log, start_logging
from peft_pretraining.train import Run, TrainingFailed, train
from peft_pretraining.validate import FileFacts

_SECONDS_TO_FINISH = 60.0
"""How long a run that fails waits for a checkpoint that is being written."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "tokenizer.model", "vocab.json", "merges.txt"),
)


def run(launch: Launch) -> int:
    """Build and train; returns the exit code. Raises `ConfigError` for problems only the device or the data show."""
    group = ProcessGroup.start(launch.config.run.single_gpu)
    start_logging(group.is_main)
    disable_progress_bar()  # transformers' bars for single files would break ours
    run = build(launch, group)
    atexit.register(end_workers)  # after the workers were started: what is registered last is called first
    exit_code = 1
    try:
        exit_code = train(run)
    except (TrainingFailed, DataError) as error:
        log.error("%s", error)
    except SaveFailed as error:
        if group.is_main:  # it fails on all ranks alike
            log.error("%s", error)
    finally:
        run.checkpointer.wait(_SECONDS_TO_FINISH)  # the other ranks' threads write on, whatever their training does
        run.profiler.stop()
        run.tracker.close(exit_code)
    group.stop()  # only after success: with a rank that failed, leaving the group could wait for ever
    return exit_code


@dataclass(frozen=True)
class StartingPoint:
    """Where the run's weights and counters come from."""

    checkpoint: Path | None = None
    """Restore everything from here."""
    warm_start: Path | None = None
    """Take weights and counters only."""


def build(launch: Launch, group: ProcessGroup) -> Run:
    """Put the run together. Nothing is written before everything that can fail on bad input has succeeded."""
    config = launch.config
    for warning in launch.warnings:
        log.warning(warning)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    save_dir = Path(group.from_main(config.run.save_dir or _default_save_dir(config)))
    start = group.from_main(_starting_point(config, save_dir) if group.is_main else None)
    if isinstance(start, ConfigError):
        raise start

    data = open_data(launch, group)
    method = load_method(config.method.method)(config)
    weights_from = str(start.warm_start) if start.warm_start else config.model.model_name_or_path
    model = distributed_model(config, launch.facts.model, method, group, weights_from)
    optimizer = method.build_optimizer(model)
    checkpointer = Checkpointer(
        save_dir,
        group,
        model,
        optimizer,
        method,
        _tokenizer_saver(config, launch.facts, group.is_main),
        config.run.keep_checkpoints,
        config.distributed.async_save,
    )
    state = _initial_state(config, start, checkpointer)
    method.prepare(model, optimizer, group.all_reduce_mean)
    parallel_model = reduced_model(config, method, group, model, optimizer)
    if group.is_main:
        _prepare_save_dir(save_dir, launch)
    group.barrier()
    _describe(config, save_dir, model, data, group)
    return Run(
        config=config,
        group=group,
        model=model,
        parallel_model=parallel_model,
        method=method,
        optimizer=optimizer,
        state=state,
        data=data,
        batches=data.training(state.data_position, state.data_state),
        checkpointer=checkpointer,
        tracker=Tracker(save_dir, config, state if start.checkpoint else None, model, group.is_main),
        profiler=Profiler(config.run.profile, save_dir / "profile", group.rank),
    )


def distributed_model(
    config: Config,
    shape: dict[str, Any],
    method: TrainingMethod,
    group: ProcessGroup,
    weights_from: str | None = None,
) -> torch.nn.Module:
    """The training model, with its layers changed and its parameters divided as the settings say.

    `shape` is the model JSON's. Weights that are drawn get their memory last, so that a device never holds more than
    its part of them; with `weights_from`, a folder or hub name, they are read.
    """
    distributed = config.distributed
    divided = distributed.distributed_type == "fsdp" and group.world_size > 1
    model = build_model(config.model, shape, weights_from, group.device)
    if type(method).convert is not TrainingMethod.convert:  # which may read the weights
        # Dividing a model moves it to the devices, layer by layer: the whole of it need not fit on one.
        materialize(model, torch.device("cpu") if divided else group.device, config.run.seed)
        model = method.convert(model)
    if divided:
        model = shard(
            model,
            group,
            Sharding(
                distributed.replicas,
                distributed.reshard_after_forward,
                method.sharded_dimension,
                method.is_replicated,
            ),
        )
    materialize(model, group.device, config.run.seed)
    return model


def reduced_model(
    config: Config,
    method: TrainingMethod,
    group: ProcessGroup,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> torch.nn.Module:
    """The module whose backward pass leaves gradients averaged over the ranks, or their projections."""
    if method.reduces_gradients:
        return model
    low_rank = config.distributed.reduce_low_rank is not False and group.world_size > 1
    return parallelize(model, group, method.low_rank_reduction(model, optimizer) if low_rank else None)


def _default_save_dir(config: Config) -> str:
    model = Path(config.model.model_config or config.model.model_name_or_path or "model").stem
    return f"checkpoints/{model}-{config.method.method}-{time.strftime('%Y%m%d-%H%M%S')}"


def _starting_point(config: Config, save_dir: Path) -> StartingPoint | ConfigError:
    """On the main process: which checkpoint to continue from. A problem is returned, for all ranks to raise."""
    run = config.run
    if run.autoresume:
        folder, skipped = run_dir.newest_good_checkpoint(save_dir)
        for line in skipped:
            log.warning(line)
        if folder is not None:
            log.info("resuming from %s", folder)
            return StartingPoint(checkpoint=folder)
        if skipped and not run.allow_restart:
            return ConfigError(
                [*skipped, f"--save_dir {save_dir}: every checkpoint is damaged; --allow_restart True starts over"]
            )
    if run.resume_from:
        folder = Path(run.resume_from)
        if reason := run_dir.damage(folder):
            return ConfigError([f"--resume_from {folder}: {reason}"])
        log.info("restoring everything from %s", folder)
        return StartingPoint(checkpoint=folder)
    return StartingPoint(warm_start=Path(run.warmed_up_model) if run.warmed_up_model else None)


def _initial_state(config: Config, start: StartingPoint, checkpointer: Checkpointer) -> TrainState:
    if start.checkpoint is not None:
        try:
            return checkpointer.restore(start.checkpoint)
        except ValueError as error:
            raise ConfigError([f"{start.checkpoint} cannot be loaded: {error}"]) from error
    if start.warm_start is None:
        return TrainState()
    state = starting_counters(start.warm_start)
    remaining = config.schedule.num_training_steps - state.update_step
    if remaining <= 0:
        raise ConfigError(
            [f"--num_training_steps {config.schedule.num_training_steps} ends before update {state.update_step} of "
             f"--warmed_up_model {start.warm_start}"]
        )  # fmt: skip
    if problems := schedule_problems(config.schedule, remaining):
        raise ConfigError(problems)
    log.info("weights of %s; updates are counted from %d", start.warm_start, state.update_step)
    return state


def _prepare_save_dir(save_dir: Path, launch: Launch) -> None:
    """The first writing of a run: its folder and its settings."""
    save_dir.mkdir(parents=True, exist_ok=True)
    for leftover in (*save_dir.glob("model_*.tmp"), *save_dir.glob("model_*.replaced")):
        shutil.rmtree(leftover, ignore_errors=True)
    run_dir.write_run_config(save_dir, launch.config.settings(), launch.identity, versions())


def _tokenizer_saver(config: Config, facts: FileFacts, is_main: bool) -> Callable[[Path], None]:
    """Copies the data folder's tokenizer, or writes the one that was named."""
    if not is_main:
        return lambda folder: None
    source = Path(config.data.dataset_path or "")
    if facts.tokenizer is None and config.data.tokenizer is None and (source / "tokenizer_config.json").is_file():
        files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
        return lambda folder: [shutil.copy(file, folder) for file in files] and None
    name = facts.tokenizer or config.data.tokenizer or facts.data.get("tokenizer") or DEFAULT_TOKENIZER
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained
    except (OSError, ValueError) as error:
        log.warning("checkpoints will hold no tokenizer: %s cannot be loaded (%s)", name, str(error).splitlines()[0])
        return lambda folder: None


def _describe(config: Config, save_dir: Path, model: torch.nn.Module, data: Data, group: ProcessGroup) -> None:
    batch = config.batch
    trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
    log.info("run folder %s", save_dir)
    log.info(
        "%s on %d x %s, %s: %.2fM parameters, %.2fM trainable",
        *(config.method.method, group.world_size, group.device.type, resolve_dtype(config.model.dtype, group.device)),
        *(sum(param.numel() for param in model.parameters()) / 1e6, trainable / 1e6),
    )
    log.info(
        "%d updates of %d x %d tokens (batch %d x accumulation %d x %d processes) from %s",
        *(config.schedule.num_training_steps + config.schedule.num_extra_training_steps, batch.total_batch_size),
        *(config.data.max_length, batch.batch_size, batch.gradient_accumulation, batch.world_size, data.description),
    )
