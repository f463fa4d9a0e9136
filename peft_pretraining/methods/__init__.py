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


_PROJECTION = (
    *("rank", "scale", "update_proj_gap", "proj_type", "target_modules", "clip_norm"),
    *("svd_method", "stagger_refresh", "refresh_accumulation", "per_layer"),
)
_RULES = ("adamw", "adamw8bit", "adafactor", "lion", "sgd")
_GALORE_EPS = {"adam_eps": 1e-6}

METHODS: dict[str, MethodEntry] = {
    "full_rank": MethodEntry("peft_pretraining.methods.full_rank:FullRank", optimizers=(*_RULES, "adam_zero")),
    "galore": MethodEntry("peft_pretraining.methods.galore:GaLore", _PROJECTION, _RULES, _GALORE_EPS),
    "golore": MethodEntry("peft_pretraining.methods.golore:GoLore", (*_PROJECTION, "rand_ratio"), _RULES, _GALORE_EPS),
    "online_subspace_descent": MethodEntry(
        "peft_pretraining.methods.online_subspace_descent:OnlineSubspaceDescent",
        _PROJECTION,
        _RULES,
        {**_GALORE_EPS, "proj_type": "continuous"},
    ),
}

_ADAM = ("adam_beta1", "adam_beta2", "adam_eps")
RULE_SETTINGS: dict[str, tuple[str, ...]] = {
    "adamw": _ADAM,
    "adamw8bit": _ADAM,
    "adam_zero": _ADAM,
    "adafactor": ("beta1",),
    "lion": (),
    "sgd": ("beta1", "momentum", "dampening"),
}
"""Settings that an update rule reads, of those that belong to update rules."""

PLANNED = ("lora", "relora", "switchlora")
"""Methods whose flags are understood but which are not built yet."""


def load_method(name: str) -> type[TrainingMethod]:
    """The class registered under `name`."""
    module, _, attribute = METHODS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)
