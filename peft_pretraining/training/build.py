"""From a checked configuration to a run: every object, in the order of their dependencies."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.checkpointer import Checkpointer, versions
from peft_pretraining.checkpoint.failures import TrainingFailed
from peft_pretraining.checkpoint.folder_lock import FolderLock
from peft_pretraining.checkpoint.resume import RunRecord
from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.config import Config
from peft_pretraining.config.cli import ParsedArgs
from peft_pretraining.config.validate import FileFacts
from peft_pretraining.data.blocks import end_workers
from peft_pretraining.data.data import Data
from peft_pretraining.data.folder import DEFAULT_TOKENIZER
from peft_pretraining.data.mixture import first_folder
from peft_pretraining.data.prompt_tokenizer import SavedTokenizer
from peft_pretraining.data.shards import DataError
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import load_method
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.token_ids import adopt
from peft_pretraining.optim.group_record import GroupRecord
from peft_pretraining.optim.model_groups import record_groups
from peft_pretraining.optim.state.gradient_owner import gradient_owner
from peft_pretraining.training.build_data import open_data
from peft_pretraining.training.build_model import describe_speed, distributed_model, reduced_model
from peft_pretraining.training.device_settings import for_device, set_matmul_precision
from peft_pretraining.training.layer_log import LayerLog
from peft_pretraining.training.loop import Run, train
from peft_pretraining.training.profiling import Profiler, describe_peak, reset_peak_memory
from peft_pretraining.training.samples import Sampler
from peft_pretraining.training.starting import begin_writing, restored_state, starting_point, take_folder
from peft_pretraining.training.tracking import Tracker, log, start_logging
from peft_pretraining.training.utilisation import Utilisation

T = TypeVar("T")

_SECONDS_TO_FINISH = 60.0
"""How long a run that fails waits for a checkpoint that is being written."""


def run(launch: ParsedArgs) -> int:
    """Build and train; returns the exit code. Raises `ConfigError` for problems only the device or the data show."""
    try:
        return _run(launch)
    except torch.OutOfMemoryError as error:
        log.debug("out of memory", exc_info=True)
        seen = " ".join(str(error).split()).partition(" Of the allocated memory")[0]
        log.error("%s python -m peft_pretraining.report.plan with the same flags says what fits", seen)
        return 1  # without leaving the group: the other ranks are in the middle of an update


def _run(launch: ParsedArgs) -> int:
    group = ProcessGroup.start(launch.config.run.single_gpu, of_one=launch.names_layout)
    start_logging(group.is_main)
    disable_progress_bar()  # transformers' bars for single files would break ours
    with ExitStack() as stack:
        run = build(launch, group, stack)
        atexit.register(end_workers)  # after the workers were started: what is registered last is called first
        exit_code = 1
        try:
            exit_code = train(run)
            log.info("%s", describe_peak(group.device))
        except DataError as error:
            log.error("%s", error)
        except TrainingFailed as error:
            if group.is_main:  # it fails on all ranks alike, or on the main process alone
                log.error("%s", error)
        finally:
            run.checkpointer.wait(_SECONDS_TO_FINISH)  # the other ranks' threads write on, whatever their training does
            run.profiler.stop()
            run.tracker.close(exit_code)
    group.stop()  # only after success: with a rank that failed, leaving the group could wait for ever
    return exit_code


def build(launch: ParsedArgs, group: ProcessGroup, stack: ExitStack) -> Run:
    """Put the run together; `stack` gives its folder back at the end.

    Nothing is written before everything that can fail on bad input has succeeded, but for the mark of who holds a
    folder that is there already.
    """
    launch = for_device(launch, group.device.type)
    config = launch.config
    for warning in launch.warnings:
        log.warning(warning)
    set_matmul_precision(config, group.device)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    save_dir = Path(group.from_main(config.run.save_dir or _default_save_dir(config)))
    exists = group.from_main(save_dir.is_dir())
    lock = _hold(save_dir, group, stack) if exists else None
    start = starting_point(config, launch.identity, save_dir, group)
    record = replace(start.record, identity=launch.identity, settings=config.settings())

    data = open_data(launch, group)
    weights_from = str(start.warm_start) if start.warm_start else config.model.model_name_or_path
    tokenizer = _saved_tokenizer(config, launch.facts) if group.is_main else SavedTokenizer()
    parts = assemble(launch, group, save_dir, record, weights_from, tokenizer)
    state = restored_state(config, start, parts.checkpointer, group)
    resumed = state if start.in_own_folder else None
    if state is None:
        record = replace(record, id=group.from_main(RunRecord.begin().id))
        parts, state = assemble(launch, group, save_dir, record, weights_from, tokenizer), TrainState()
    if resumed is None:
        record = parts.checkpointer.record = replace(record, first_update=state.update_step)
    model, method, optimizer = parts.model, parts.method, parts.optimizer
    sampler = Sampler(config, launch.facts, model.config.vocab_size, group)
    method.prepare(model, optimizer, group.averaging)
    gradients = gradient_owner(optimizer, model)
    parallel_model = reduced_model(config, group, model, gradients)
    if not exists:
        lock = _begin_folder(save_dir, group, stack)
    groups = record_groups(model, optimizer, config.optimizer.optimizer)
    if group.is_main:
        begin_writing(save_dir, record, versions(), groups)
    group.barrier()
    _describe(config, save_dir, model, groups, data, group)
    more = {
        **{"parameter_groups": list(map(str, groups)), "model_shape": model.config.to_dict(), "versions": versions()},
        **{"run_id": record.id, "device": _device_name(group.device), "data": data.description},
    }
    tracker = Tracker(save_dir, config, resumed, model, group.is_main, record.first_update, lock, more)
    reset_peak_memory(group.device)
    return Run(
        config=config,
        group=group,
        model=model,
        parallel_model=parallel_model,
        method=method,
        optimizer=optimizer,
        gradients=gradients,
        state=state,
        data=data,
        batches=data.training(state.data_position, state.data_state),
        checkpointer=parts.checkpointer,
        tracker=tracker,
        profiler=Profiler(config.run.profile, save_dir / "profile", group.rank),
        sampler=sampler,
        layer_log=LayerLog(config.tracking.log_layers, model, optimizer, state),
        utilisation=Utilisation(config, model.config, group.device),
    )


def _on_main(group: ProcessGroup, act: Callable[[], T | ConfigError]) -> T | None:
    """Let the main process alone do something; all raise the problem that it may return."""
    found = act() if group.is_main else None
    problem = group.from_main(found if isinstance(found, ConfigError) else None)
    if problem is not None:
        raise problem
    assert not isinstance(found, ConfigError), "a problem of the main process is raised on all"
    return found


def _hold(save_dir: Path, group: ProcessGroup, stack: ExitStack) -> FolderLock | None:
    """Take the run's folder, on the main process alone, until `stack` ends."""
    lock = _on_main(group, lambda: take_folder(save_dir))
    if lock is not None:
        stack.callback(lock.release)
    return lock


def _begin_folder(save_dir: Path, group: ProcessGroup, stack: ExitStack) -> FolderLock | None:
    """Make the folder of a new run, and take it; another run may have been quicker."""

    def make() -> ConfigError | None:
        try:
            save_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return ConfigError([f"--save_dir {save_dir}: cannot be made ({error.strerror or error})"])
        return None

    _on_main(group, make)
    lock = _hold(save_dir, group, stack)

    def check() -> ConfigError | None:
        if (save_dir / run_dir.CONFIG_FILE).exists() or run_dir.completed_checkpoints(save_dir):
            return ConfigError([f"--save_dir {save_dir}: another run has begun there meanwhile; choose another folder"])
        return None

    _on_main(group, check)
    return lock


@dataclass
class Parts:
    """What a checkpoint is loaded into."""

    model: PreTrainedModel
    method: TrainingMethod
    optimizer: torch.optim.Optimizer
    checkpointer: Checkpointer


def assemble(
    launch: ParsedArgs,
    group: ProcessGroup,
    save_dir: Path,
    record: RunRecord,
    weights_from: str | None,
    tokenizer: SavedTokenizer,
) -> Parts:
    """The parts of a run as they are before its first update."""
    config = launch.config
    method = load_method(config.method.method)(config)
    model = distributed_model(config, launch.facts.model or {}, method, group, weights_from)
    optimizer = method.build_optimizer(model)
    if tokenizer.tokenizer is not None:
        for line in adopt(model, tokenizer.tokenizer, launch.facts.model or {}):
            log.warning(line)
    checkpointer = Checkpointer(
        save_dir,
        group,
        model,
        optimizer,
        method,
        tokenizer.write,
        record,
        config.run.keep_checkpoints,
        config.distributed.async_save,
    )
    return Parts(model, method, optimizer, checkpointer)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _default_save_dir(config: Config) -> str:
    model = Path(config.model.model_config or config.model.model_name_or_path or "model").stem
    return f"checkpoints/{model}-{config.method.method}-{time.strftime('%Y%m%d-%H%M%S')}"


def _saved_tokenizer(config: Config, facts: FileFacts) -> SavedTokenizer:
    """The data folder's tokenizer, or the one that was named, as checkpoints have it."""
    source = Path(first_folder(config.data.dataset_path) if config.data.dataset_path else "")
    if facts.tokenizer is None and config.data.tokenizer is None and (source / "tokenizer_config.json").is_file():
        return SavedTokenizer.of(source, config.data.max_length)
    name = facts.tokenizer or config.data.tokenizer or facts.data.get("tokenizer") or DEFAULT_TOKENIZER
    return SavedTokenizer.of(name, config.data.max_length)


def _describe(
    config: Config,
    save_dir: Path,
    model: torch.nn.Module,
    groups: Sequence[GroupRecord],
    data: Data,
    group: ProcessGroup,
) -> None:
    batch = config.batch
    trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
    log.info("run folder %s", save_dir)
    log.info(
        "%s on %d x %s, torch.%s: %.2fM parameters, %.2fM trainable",
        *(config.method.method, group.world_size, group.device.type),
        config.resolved_precision(group.device.type).weight_dtype,
        *(sum(param.numel() for param in model.parameters()) / 1e6, trainable / 1e6),
    )
    for line in (config.resolved_precision(), describe_speed(model), *groups):
        log.info("%s", line)
    log.info(
        "%d updates of %d x %d tokens (batch %d x accumulation %d x %d processes) from %s",
        *(config.schedule.num_training_steps + config.schedule.num_extra_training_steps, batch.total_batch_size),
        *(config.data.max_length, batch.batch_size, batch.gradient_accumulation, batch.world_size, data.description),
    )
