"""All settings of a pre-training run, from the command line to checked dataclasses.

Imports of the package: `checkpoint`, `data`, `flags`, `methods`, `models`, `optim`, `runtime`. Free of
torch, and so is what it imports.
"""

from peft_pretraining.config.derive import derive_batch, schedule_problems
from peft_pretraining.config.precision_config import Precision, PrecisionConfig
from peft_pretraining.config.run_config import RunConfig
from peft_pretraining.config.sections import (
    SCHEDULERS,
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    config_flags,
)
from peft_pretraining.config.tracking_config import TrackingConfig

__all__ = [
    "SCHEDULERS",
    "BatchConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "PrecisionConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "config_flags",
    "derive_batch",
    "schedule_problems",
]
