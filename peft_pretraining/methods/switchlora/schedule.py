"""How many vectors SwitchLoRA switches, and when (arXiv 2406.06564). Pure numbers: nothing here imports torch.

t is the 0-based update since SwitchLoRA began, r a layer's rank. A slot is replaced once per interval on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_pretraining.methods.switchlora.settings import SwitchLoRASettings

_LOWEST_RATE = 1e-8


@dataclass(frozen=True)
class SwitchSchedule:
    first_interval: float
    """Updates between two switches of a slot while the rate is 1."""
    descent: float
    """D: updates after which the rate is 0.3 (`exponential`) or a half (`Z`)."""
    kind: str = "exponential"
    fixed: bool = False
    """The rate is always 1."""

    @classmethod
    def of(cls, settings: SwitchLoRASettings, total: int) -> SwitchSchedule:
        """The schedule of a run over `total` updates."""
        return cls(
            first_interval=settings.switch_lora_interval,
            descent=settings.switch_lora_descent_rate * total,
            kind=settings.switch_descend_type,
            fixed=settings.fix_switch_lora_interval,
        )

    def rate(self, t: int) -> float:
        """Switching frequency of update t, relative to the first interval's."""
        if self.fixed:
            return 1.0
        if self.kind == "Z":
            exponent = min(10 / self.descent * (t - self.descent), 700.0)  # exp overflows beyond
            return max(1 / (1 + math.exp(exponent)), _LOWEST_RATE)
        slowed: float = 0.3 ** ((t + 1) / self.descent)
        return max(slowed, _LOWEST_RATE)

    def interval(self, t: int) -> float:
        return self.first_interval / self.rate(t)

    def expected_count(self, t: int, rank: int) -> float:
        """Mean number of slots of one factor that update t switches."""
        return rank / self.interval(t)

    def requested_count(self, t: int, rank: int, uniform: float) -> int:
        """The mean rounded up or down, up with its fraction's probability, for a `uniform` in [0, 1)."""
        expected = self.expected_count(t, rank)
        whole = math.floor(expected)
        return whole + (uniform < expected - whole)


def allowed_count(requested: int, rank: int, frozen: int, candidates: int) -> int:
    """Clamp a count so that no frozen slot is switched and the slots of A and B stay apart; the rest is dropped.

    A's slots are half a rank ahead of B's, and a switch of one freezes the same slots of the other. Beyond the
    reference, no more are switched than there are candidates that are not live.
    """
    return max(0, min(requested, rank // 2 - frozen, candidates - rank))
