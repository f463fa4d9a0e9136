"""The update rules by name, and the settings of each. No torch; `rules/` has the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_pretraining.flags import (
    RuleSettings,
    RuleSpec,
    fraction_below_one,
    fraction_up_to_one,
    positive_float,
    setting,
)


@dataclass(frozen=True)
class AdamSettings(RuleSettings):
    adam_beta1: float = setting(0.9, fraction_below_one, "AdamW: decay of the first moment")
    adam_beta2: float = setting(0.999, fraction_below_one, "AdamW: decay of the second moment")
    adam_eps: float = setting(1e-8, positive_float, "AdamW: added to the root of the second moment")

    def arguments(self) -> dict[str, Any]:
        return {"betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_eps}


@dataclass(frozen=True)
class AdafactorSettings(RuleSettings):
    beta1: float | None = setting(
        None, fraction_below_one, "Adafactor: decay of the first moment (default: none); full-rank SGD: --momentum"
    )

    def arguments(self) -> dict[str, Any]:
        return {"beta1": self.beta1}


@dataclass(frozen=True)
class SGDSettings(RuleSettings):
    momentum: float = setting(0.9, fraction_below_one, "SGD: decay of the momentum buffer")
    dampening: float = setting(0.9, fraction_up_to_one, "SGD: what is subtracted from 1 to weigh a gradient in it")

    def arguments(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "dampening": self.dampening}


_SPECS = (
    RuleSpec("adamw", "AdamW", AdamSettings, "1711.05101", state="2k"),
    RuleSpec(
        "adamw8bit",
        "AdamW with 8-bit moments",
        AdamSettings,
        "2110.02861",
        state="2k bytes, and 4 per 256 of them",
        compact=True,
    ),
    RuleSpec(
        "adam_zero",
        "AdamW whose state is divided over the processes",
        AdamSettings,
        "1910.02054",
        state="2k over all processes",
        fine_tuning=False,
        keeps_formats=False,
    ),
    RuleSpec("adafactor", "Adafactor", AdafactorSettings, "1804.04235", state="rows + columns (k more with --beta1)"),
    # Every weight moves by the sign of the update, whatever factor that had.
    RuleSpec("lion", "Lion", paper="2302.06675", state="k", unread=("scale",), tiny={"lr": 3e-3}),
    RuleSpec("sgd", "SGD with momentum", SGDSettings, state="k (nothing with --momentum 0)", tiny={"lr": 1.0}),
)
RULES: dict[str, RuleSpec] = {spec.name: spec for spec in _SPECS}
