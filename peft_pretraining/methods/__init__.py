"""The registry of training methods: one line each.

The command line is checked before torch is imported, so an entry names its class instead of importing it, and says
which settings the method reads (any other method setting that is given has no effect, and the user is told) and where
its defaults differ from those of `config.py`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_pretraining.methods.base import TrainingMethod


@dataclass(frozen=True)
class MethodEntry:
    target: str
    """`module:Class` of a `TrainingMethod`."""
    options: tuple[str, ...] = ()
    """Fields of `MethodConfig` (and other method settings) that the method reads."""
    optimizers: tuple[str, ...] = ("adamw",)
    """Update rules (`--optimizer`) that it can be combined with."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of this method that differ from `config.py`."""


_PROJECTION = ("rank", "scale", "update_proj_gap", "proj_type", "target_modules", "clip_norm")

METHODS: dict[str, MethodEntry] = {
    "full_rank": MethodEntry("peft_pretraining.methods.full_rank:FullRank"),
    "galore": MethodEntry("peft_pretraining.methods.galore:GaLore", _PROJECTION, defaults={"adam_eps": 1e-6}),
}

PLANNED = ("golore", "online_subspace_descent", "lora", "relora", "switchlora")
"""Methods whose flags are understood but which are not built yet."""


def load_method(name: str) -> type[TrainingMethod]:
    """The class registered under `name`."""
    module, _, attribute = METHODS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)
