"""Real updates of a run on a device that does not exist: built by the run's own functions, made by its own loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.config import Config
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.distributed.sharding import local
from peft_pretraining.methods import load_method
from peft_pretraining.models.loss import Batch
from peft_pretraining.optim.state.gradient_owner import gradient_owner
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT
from peft_pretraining.report.footprint.counters import Counts
from peft_pretraining.report.footprint.processes import PER_NODE, group_of
from peft_pretraining.report.footprint.stand_ins import META, as_on_a_gpu
from peft_pretraining.report.footprint.storages import Storage
from peft_pretraining.report.footprint.tracker import Tracker
from peft_pretraining.training.build_model import distributed_model, reduced_model
from peft_pretraining.training.loop import Run, train_step

MICRO_BATCHES = 3
"""The first, the last, and one that stands for all between them."""


@dataclass
class Measured:
    """One update."""

    peak: int
    """Bytes."""
    components: dict[str, int]
    """Bytes of each component at the peak."""
    phase: str
    """That the peak falls into."""
    operator: str
    """What asked for the memory that made it."""
    counts: Counts
    held: list[Storage] = field(repr=False)
    """What was live at the peak."""


class Simulation:
    """A run on a device of the imagination: use it as a context."""

    def __init__(self, config: Config, shape: dict[str, Any], devices: int = 1):
        self.config, self.shape = config, shape
        self.tracker = Tracker()
        self.group = ProcessGroup(0, devices, 0, min(devices, PER_NODE), META)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Simulation:
        quantised = any(isinstance(each, str) and "bit" in each for each in self.config.settings().values())
        try:
            self._stack.enter_context(as_on_a_gpu(quantised))
            if self.group.world_size > 1:
                self._stack.enter_context(group_of(self.group.world_size, self.tracker))
            self._stack.enter_context(self.tracker)
            self.run = self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.run = cast(Run, None)
        self._stack.close()

    def _build(self) -> Run:
        """As `training.build.build` does, without data, folder and records."""
        config, group = self.config, self.group
        self._enter("building")
        method = load_method(config.method.method)(config)
        model = distributed_model(config, self.shape, method, group)
        optimizer = method.build_optimizer(model)
        self._say_what_is_held(model, optimizer)
        for param in model.parameters():  # before the method's own hooks, which may free the gradient
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._gradient_arrived)
        method.prepare(model, optimizer, group.all_reduce_mean)
        gradients = gradient_owner(optimizer, model)
        parallel_model = reduced_model(config, group, model, gradients)
        if isinstance(parallel_model, DistributedDataParallel) and not parallel_model._comm_hooks:
            parallel_model.register_comm_hook(None, allreduce_hook)  # what DDP does anyway, where it can be seen
            self.tracker.storages.say_of_those("building", "gradients")  # DDP's buckets
        optimizer.register_step_pre_hook(self._step_begins)
        return Run(
            config=config,
            group=group,
            model=model,
            parallel_model=parallel_model,
            method=method,
            optimizer=optimizer,
            gradients=cast(Any, _Watched(gradients, self)),
            state=TrainState(),
            data=cast(Any, SimpleNamespace(state_at=lambda position: {})),
            batches=_endless(self),
            checkpointer=cast(Any, None),
            tracker=cast(Any, None),
            profiler=cast(Any, None),
        )

    def _enter(self, phase: str) -> None:
        self.tracker.phase = phase

    def _step_begins(self, *args: Any) -> None:
        self._enter("step")
        for param in self.run.model.parameters():  # views of DDP's buckets, too
            self._gradient_arrived(param)

    def _gradient_arrived(self, param: torch.Tensor) -> None:
        if param.grad is not None:
            self.tracker.storages.say(local(param.grad), "gradients", override=True)

    def _say_what_is_held(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Frozen factors of the adapter form are a basis."""
        say = self.tracker.storages.say
        for name, param in model.named_parameters():
            frozen_factor = "lora_" in name and not param.requires_grad
            if local(param).is_meta:
                say(local(param), "bases" if frozen_factor else "weights")
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and local(value).is_meta:
                    say(local(value), "bases" if key.startswith((LEFT, RIGHT)) else "states")
        self.tracker.storages.say_of_those("building", "weights")  # buffers, and what a layer keeps beside its weight

    def update(self, step: int, batch_size: int | None = None) -> Measured:
        """Update `step`, with micro-batches of `batch_size` sequences."""
        tracker, config, run = self.tracker, self.config, self.run
        self.batch_size = batch_size or config.batch.batch_size or 1
        length = config.data.max_length or 256
        tracker.logits = (self.batch_size * length, self.shape["vocab_size"])
        run.state.update_step = step
        tracker.phase, tracker.counts = "before", Counts()
        self.parts: list[Counts] = [tracker.counts]
        begin = len(tracker.storages)
        accumulation = config.batch.gradient_accumulation or 1
        self.micro_batches = min(accumulation, MICRO_BATCHES)
        batches = [next(run.batches) for _ in range(self.micro_batches)]
        train_step(run, batches, cast(Any, SimpleNamespace(received=False, anywhere=lambda group: False)))
        counts = Counts()
        for index, part in enumerate(self.parts):
            counts.add(part, accumulation - 2 if index == 2 and accumulation > MICRO_BATCHES else 1)
        peak, held = tracker.storages.peak(begin)
        components: dict[str, int] = {}
        for entry in held:
            name = entry.component or "workspace"
            components[name] = components.get(name, 0) + entry.size
        last = held[-1]
        return Measured(peak, components, last.phase, last.operator, counts, held)

    def micro_batch_begins(self, index: int) -> None:
        """The middle one of three is counted once for all between the first and the last."""
        if index > 0:
            self.tracker.storages.say_of_those("backward", "gradients")
        if index < MICRO_BATCHES:
            self.tracker.counts = Counts()
            self.parts.append(self.tracker.counts)

    def batch(self) -> Batch:
        length = self.config.data.max_length or 256
        return {"input_ids": torch.zeros(self.batch_size, length, dtype=torch.int64)}


def _endless(simulation: Simulation) -> Iterator[Batch]:
    while True:
        yield simulation.batch()


class _Watched:
    """The optimizer's answers about gradients; who asks tells the phase of the update."""

    def __init__(self, gradients: Any, simulation: Simulation):
        self._gradients, self._simulation = gradients, simulation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gradients, name)

    def begin_micro_batch(self, index: int, count: int) -> None:
        self._simulation.micro_batch_begins(index)
        self._simulation._enter("forward")
        self._gradients.begin_micro_batch(index, count)

    def grad_norm(self) -> torch.Tensor:
        self._simulation.tracker.storages.say_of_those("backward", "gradients")
        self._simulation._enter("norm")
        return cast(torch.Tensor, self._gradients.grad_norm())
