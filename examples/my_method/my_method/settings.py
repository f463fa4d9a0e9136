"""What AdEMAMix is called, what can be set and what it permits. No torch: command lines are checked with this."""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import (
    Allows,
    MethodSettings,
    MethodSpec,
    fraction_below_one,
    non_negative_float,
    positive_int,
    setting,
)


@dataclass(frozen=True)
class AdEMAMixSettings(MethodSettings):
    """β1, β2 and ε are AdamW's, and have its flags."""

    ademamix_alpha: float = setting(5.0, non_negative_float, "AdEMAMix: weight of the slow moment in the update")
    ademamix_beta3: float = setting(0.9999, fraction_below_one, "AdEMAMix: decay of the slow moment")
    ademamix_warmup: int | None = setting(
        None, positive_int, "AdEMAMix: updates in which alpha and beta3 rise (default: --num_training_steps)"
    )


SPEC = MethodSpec(
    name="ademamix_example",
    title="AdEMAMix",
    paper="2409.03137",
    year=2024,
    summary="AdamW with a second, slow first moment",
    settings=AdEMAMixSettings,
    update_rules=("adamw",),
    state="3mn",
    allows=Allows(fsdp=True, fine_tuning=True, stochastic_rounding=True),
    tiny={"ademamix_beta3": 0.99},
)
