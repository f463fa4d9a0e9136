"""What every method with a rank has. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import MethodSettings, comma_separated, positive_int, setting


@dataclass(frozen=True)
class LowRankSettings(MethodSettings):
    rank: int = setting(128, positive_int, "rank of the low-rank updates", ("lora_r", "lora_rank"), identity=True)
    target_modules: tuple[str, ...] = setting(
        ("attn", "attention", "mlp"),
        comma_separated,
        "linear layers whose dotted name contains one of these",
        identity=True,
    )
