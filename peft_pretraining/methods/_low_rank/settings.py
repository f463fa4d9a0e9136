"""What every method with target layers has, and every one with a rank. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import MethodSettings, comma_separated, positive_int, setting


@dataclass(frozen=True)
class TargetSettings(MethodSettings):
    target_modules: tuple[str, ...] = setting(
        ("attn", "attention", "mlp"),
        comma_separated,
        "linear layers whose dotted name contains one of these",
        identity=True,
    )


@dataclass(frozen=True)
class LowRankSettings(TargetSettings):
    rank: int = setting(128, positive_int, "rank of the low-rank updates", ("lora_r", "lora_rank"), identity=True)
