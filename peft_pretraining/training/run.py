"""The parts of a run, put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from peft_pretraining.checkpoint.checkpointer import Checkpointer
from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.config import Config
from peft_pretraining.data.data import Data
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.loss import Batch
from peft_pretraining.optim.state.gradient_owner import GradientOwner
from peft_pretraining.training.late_values import LateValues
from peft_pretraining.training.layer_log import LayerLog
from peft_pretraining.training.profiling import Profiler
from peft_pretraining.training.samples import Sampler
from peft_pretraining.training.tracking import Tracker
from peft_pretraining.training.utilisation import Utilisation


@dataclass
class Run:
    """Everything a run consists of; `build.py` puts it together."""

    config: Config
    group: ProcessGroup
    model: nn.Module
    parallel_model: nn.Module
    """`model`, wrapped for several devices."""
    method: TrainingMethod
    optimizer: Optimizer
    gradients: GradientOwner
    """The optimizer's answers about gradients."""
    state: TrainState
    data: Data
    batches: Iterator[Batch]
    """Endless micro-batches of this rank, from `state.data_position` on."""
    checkpointer: Checkpointer
    tracker: Tracker
    profiler: Profiler
    sampler: Sampler
    utilisation: Utilisation
    layer_log: LayerLog

    def __post_init__(self) -> None:
        self.late = LateValues(self.group.device)
        """Numbers of the last update that have not been read or reported."""
        if self.late.on:
            self.gradients.read_late()

    @property
    def schedule_length(self) -> int:
        """Updates that the learning-rate schedule spans."""
        return self.config.schedule.num_training_steps - self.state.schedule_start

    @property
    def last_step(self) -> int:
        """Number of updates after which the run is done."""
        return self.config.schedule.num_training_steps + self.config.schedule.num_extra_training_steps
