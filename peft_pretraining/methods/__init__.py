"""The registry of training methods: one line each.

The command line is checked before torch is imported, so an entry names its class instead of importing it, and says
which settings the method reads (any other method setting that is given has no effect, and the user is told) and where
its defaults differ from those of `config/sections.py`.

Imports of the package: `distributed`, `flags`, `models`, `nn`, `optim`, `rng`. This module is free of torch.
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
    identity: tuple[str, ...] = ()
    """Settings, beside those that do so for any method, without which its saved tensors compute something else."""


_PROJECTION = (
    *("rank", "scale", "update_proj_gap", "proj_type", "target_modules", "clip_norm"),
    *("svd_method", "stagger_refresh", "refresh_accumulation", "per_layer"),
)
_RULES = ("adamw", "adamw8bit", "adafactor", "lion", "sgd")
_GALORE_EPS = {"adam_eps": 1e-6}

_FACTORS = ("rank", "target_modules", "lora_dropout", "lora_plus_ratio", "dense_lr_ratio", "check_rank_sync")
_FROZEN = (
    *("lora_alpha", "train_scaling", "force_keep_original", "lora_only", "quantize", "use_double_quant"),
    *("init_lora_type", "zero_init_B"),
)
_RELORA = ("relora", "reset_optimizer_on_relora", "optimizer_random_pruning", "optimizer_magnitude_pruning")
_SWITCHING = (
    *("lora_alpha", "init_lora_type", "zero_init_B", "force_disable_candidates", "lora_only", "quantize"),
    *("switch_lora_interval", "switch_lora_descent_rate", "switch_descend_type", "fix_switch_lora_interval"),
    *("adam_warm_step", "remain_switch_state", "remain_switch_step_state", "zero_switch_state"),
    *("zero_switch_step_state", "switch_lora_drop", "discontinuous_switch", "no_offload_candidates", "cal_delta_norm"),
)

_ADAPTER = (
    *("scale", "update_proj_gap", "rand_ratio", "clip_norm", "svd_method", "stagger_refresh", "refresh_accumulation"),
)

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
    "lora": MethodEntry(
        "peft_pretraining.methods.lora:LoRA",
        (*_FACTORS, *_FROZEN, "force_disable_candidates"),
    ),
    "relora": MethodEntry(
        "peft_pretraining.methods.relora:ReLoRA", (*_FACTORS, *_FROZEN, *_RELORA, "scale", "update_proj_gap")
    ),
    "switchlora": MethodEntry("peft_pretraining.methods.switchlora:SwitchLoRA", (*_FACTORS, *_SWITCHING)),
    "golore_adapter": MethodEntry(
        "peft_pretraining.methods.golore_adapter:GoLoreAdapter",
        (*(name for name in _FACTORS if name != "lora_plus_ratio"), *_ADAPTER, "lora_only", "quantize"),
        ("adamw", "sgd"),
        _GALORE_EPS,
        ("scale",),
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


def load_method(name: str) -> type[TrainingMethod]:
    """The class registered under `name`."""
    module, _, attribute = METHODS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)
