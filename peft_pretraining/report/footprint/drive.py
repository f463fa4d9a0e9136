"""Real updates of a run on a device that does not exist: built by the run's own functions, made by its own loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from peft_pretraining.checkpoint.checkpointer import Checkpointer
from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.config import Config
from peft_pretraining.distributed import CheckpointGroup, ProcessGroup
from peft_pretraining.distributed.sharding import local
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.models.loss import Batch
from peft_pretraining.models.model_config import vocabulary_size
from peft_pretraining.optim.state.gradient_owner import gradient_owner
from peft_pretraining.report.footprint.counters import Counts
from peft_pretraining.report.footprint.processes import group_of
from peft_pretraining.report.footprint.stand_ins import META, PER_NODE, as_on_a_gpu
from peft_pretraining.report.footprint.storages import Storage
from peft_pretraining.report.footprint.tracker import Tracker
from peft_pretraining.training.build_model import choose_loss, distributed_model, reduced_model
from peft_pretraining.training.device_settings import lean_or_not
from peft_pretraining.training.evaluate import evaluate
from peft_pretraining.training.loop import Run, train_step

MICRO_BATCHES = 3
"""The first, the last, and one that stands for all between them: further ones change neither the peak nor what one of
them costs."""
_CUDA = torch.device("cuda")


@dataclass
class Measured:
    """One update, evaluation or save."""

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
    """A run on one of `devices` that do not exist; a context.

    `shape` is the model JSON's. What a configuration leaves open is decided as on CUDA.
    """

    def __init__(self, config: Config, shape: dict[str, Any], devices: int = 1):
        for_device = METHODS[config.method.method].for_device
        chosen = dict(for_device(config, "cuda")) if for_device is not None else {}
        chosen["lean_layers"] = lean_or_not(config.model.lean_layers, "cuda")
        precision = config.resolved_precision("cuda").name
        self.config = config.replace(precision=precision, world_size=devices, **chosen)
        self.shape, self.tracker = shape, Tracker()
        self.group = _Group(0, devices, 0, min(devices, PER_NODE), META)
        self.batch_size = config.batch.batch_size or 1
        self.length = config.data.max_length or 256
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
        config, group, storages = self.config, self.group, self.tracker.storages
        self.tracker.phase, self.tracker.vocabulary = "building", vocabulary_size(self.shape)
        method = load_method(config.method.method)(config)
        model = distributed_model(config, self.shape, method, group)
        choose_loss(model, config.model.fused_loss, _CUDA)
        optimizer = method.build_optimizer(model)
        self._say_what_is_held(model, optimizer)
        for param in model.parameters():  # before the method's own hooks, which may free the gradient
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._gradient_arrived)
        method.prepare(model, optimizer, group.averaging)
        gradients = gradient_owner(optimizer, model)
        parallel_model = reduced_model(config, group, model, gradients)
        if isinstance(parallel_model, DistributedDataParallel):
            if not parallel_model._comm_hooks:
                parallel_model.register_comm_hook(None, allreduce_hook)  # what DDP does anyway, where it can be seen
            storages.say_of_those("building", "gradients")  # its buckets
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
            batches=self._batches(),
            checkpointer=Checkpointer(Path("."), group, model, optimizer, method, lambda folder: None),
            tracker=cast(Any, None),
            profiler=cast(Any, None),
            sampler=cast(Any, None),
            utilisation=cast(Any, None),
            layer_log=cast(Any, None),
        )

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
                    say(local(value), "bases" if "basis" in key else "states")
        self.tracker.storages.say_of_those("building", "weights")  # buffers, and what a layer keeps beside its weight

    def _batches(self) -> Iterator[Batch]:
        while True:
            batch = {"input_ids": torch.zeros(self.batch_size, self.length, dtype=torch.int64)}
            if self.config.data.document_mask:
                batch["position_ids"] = torch.arange(self.length).repeat(self.batch_size, 1)
            yield batch

    # What is measured.

    @property
    def accumulation(self) -> int:
        """Micro-batches of an update, at the size that they have now."""
        batch = self.config.batch
        total = batch.total_batch_size or (batch.batch_size or 1) * (batch.gradient_accumulation or 1)
        return max(1, total // (self.batch_size * self.group.world_size))

    def update(self, step: int) -> Measured:
        """Update `step`."""
        accumulation = self.accumulation
        parts = self._parts = [Counts()]
        batches = [next(self.run.batches) for _ in range(min(accumulation, MICRO_BATCHES))]
        self.run.state.update_step = step

        def act() -> None:
            train_step(self.run, batches, cast(Any, SimpleNamespace(received=False, anywhere=lambda group: False)))

        measured = self._measure(act, parts[0])
        for index, part in enumerate(parts):
            middle = index == 2 and accumulation > MICRO_BATCHES
            if index:
                measured.counts.add(part, accumulation - MICRO_BATCHES + 1 if middle else 1)
        return measured

    def evaluation(self) -> Measured:
        """One batch of it."""
        return self._measure(
            lambda: evaluate(self.run.model, [next(self.run.batches)], self.group, lambda: False), phase="evaluation"
        )

    def saving(self) -> Measured:
        """What of a save needs the device's memory: whether all is finite, and the model that is exported."""
        from peft_pretraining.checkpoint.finite import all_finite, leaves

        checkpointer = self.run.checkpointer

        def act() -> None:
            all_finite(leaves(checkpointer._tensors()), self.group)
            checkpointer._snapshot(self.run.state)

        return self._measure(act, phase="saving")

    def _measure(self, act: Callable[[], object], counts: Counts | None = None, phase: str = "before") -> Measured:
        tracker = self.tracker
        tracker.phase, tracker.counts = phase, counts or Counts()
        begun, mine = len(tracker.storages), tracker.counts
        act()
        peak, held = tracker.storages.peak(begun)
        components: dict[str, int] = {}
        for entry in held:
            name = entry.component or "workspace"
            components[name] = components.get(name, 0) + entry.size
        return Measured(peak, components, held[-1].phase, held[-1].operator, mine, held)

    # Where the update stands.

    def micro_batch_begins(self, index: int) -> None:
        """The middle one of three is counted once for all between the first and the last."""
        if index > 0:
            self.tracker.storages.say_of_those("backward", "gradients")
        self.tracker.counts, self.tracker.phase = Counts(), "forward"
        self._parts.append(self.tracker.counts)

    def gradients_are_there(self) -> None:
        self.tracker.storages.say_of_those("backward", "gradients")
        self.tracker.phase = "norm"

    def _step_begins(self, *args: Any) -> None:
        self.tracker.phase = "step"
        for param in self.run.model.parameters():  # views of DDP's buckets, too
            self._gradient_arrived(param)

    def _gradient_arrived(self, param: torch.Tensor) -> None:
        if param.grad is not None:
            self.tracker.storages.say(local(param.grad), "gradients", override=True)


class _Watched:
    """The optimizer's answers about gradients; who asks tells the phase of the update."""

    def __init__(self, gradients: Any, simulation: Simulation):
        self._gradients, self._simulation = gradients, simulation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gradients, name)

    def begin_micro_batch(self, index: int, count: int) -> None:
        self._simulation.micro_batch_begins(index)
        self._gradients.begin_micro_batch(index, count)

    def grad_norm(self) -> torch.Tensor:
        self._simulation.gradients_are_there()
        return cast(torch.Tensor, self._gradients.grad_norm())


class _Group(ProcessGroup):
    """Has no other processes to talk to."""

    def from_main(self, value: Any) -> Any:
        return value

    def checkpoint_group(self) -> CheckpointGroup:
        return CheckpointGroup(self.rank, self.world_size, None)
