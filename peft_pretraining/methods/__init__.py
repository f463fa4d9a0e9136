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

_FACTORS = ("rank", "target_modules", "lora_dropout", "lora_plus_ratio", "dense_lr_ratio", "check_rank_sync")
_FROZEN = ("lora_alpha", "train_scaling", "force_keep_original", "lora_only", "quantize", "use_double_quant")
_RELORA = ("relora", "reset_optimizer_on_relora", "optimizer_random_pruning", "optimizer_magnitude_pruning")
_SWITCHING = (
    *("lora_alpha", "init_lora_type", "zero_init_B", "force_disable_candidates", "lora_only", "quantize"),
    *("switch_lora_interval", "switch_lora_descent_rate", "switch_descend_type", "fix_switch_lora_interval"),
    *("adam_warm_step", "remain_switch_state", "remain_switch_step_state", "zero_switch_state"),
    *("zero_switch_step_state", "switch_lora_drop", "discontinuous_switch", "no_offload_candidates", "cal_delta_norm"),
)

METHODS: dict[str, MethodEntry] = {
    "full_rank": MethodEntry("peft_pretraining.methods.full_rank:FullRank"),
    "galore": MethodEntry("peft_pretraining.methods.galore:GaLore", _PROJECTION, defaults={"adam_eps": 1e-6}),
    "lora": MethodEntry(
        "peft_pretraining.methods.lora:LoRA",
        (*_FACTORS, *_FROZEN, "init_lora_type", "zero_init_B", "force_disable_candidates"),
    ),
    "relora": MethodEntry(
        "peft_pretraining.methods.relora:ReLoRA", (*_FACTORS, *_FROZEN, *_RELORA, "scale", "update_proj_gap")
    ),
    "switchlora": MethodEntry("peft_pretraining.methods.switchlora:SwitchLoRA", (*_FACTORS, *_SWITCHING)),
}

PLANNED = ("golore", "golore_adapter", "online_subspace_descent")
"""Methods whose flags are understood but which are not built yet."""


def load_method(name: str) -> type[TrainingMethod]:
    """The class registered under `name`."""
    module, _, attribute = METHODS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)
