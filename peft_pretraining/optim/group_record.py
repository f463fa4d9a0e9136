"""What a parameter group is to a reader: the weights of which roles, their update rule, rank, peak rate and decay.

Plain values, which run folders keep and comparisons print. Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GroupRecord:
    """All parameter groups with equal settings, together.

    >>> record = GroupRecord({"matrices": 1_240_000, "norms": 640}, "adamw", 0.01, 0.1, rank=40)
    >>> print(record)
    matrices 1.24M, norms 640: adamw in rank 40, rate 0.01, weight decay 0.1
    >>> GroupRecord.read(record.as_json()) == record
    True
    """

    weights: Mapping[str, int] = field(hash=False)
    """Role -> how many numbers, over all devices."""
    rule: str
    rate: float
    """The peak, which the schedule multiplies."""
    weight_decay: float
    rank: int | None = None
    """Of the projection; None where there is none."""
    lift: str | None = None
    """How the direction moves the weight, where that is not as it is or projected back."""

    def __str__(self) -> str:
        held = ", ".join(f"{role} {_short(count)}" for role, count in self.weights.items())
        rank = "" if self.rank is None else f" in rank {self.rank}"
        lift = "" if self.lift is None else f", lift {self.lift}"
        return f"{held}: {self.rule}{rank}{lift}, rate {self.rate:g}, weight decay {self.weight_decay:g}"

    def as_json(self) -> dict[str, Any]:
        return {
            "weights": dict(self.weights),
            "rule": self.rule,
            "rank": self.rank,
            "lift": self.lift,
            "rate": self.rate,
            "weight_decay": self.weight_decay,
        }

    @classmethod
    def read(cls, content: Any) -> GroupRecord:
        """From what `as_json` gave. Raises `ValueError` for anything else."""
        try:
            weights = {str(role): int(count) for role, count in content["weights"].items()}
            rank, lift = content["rank"], content["lift"]
            return cls(
                weights,
                str(content["rule"]),
                float(content["rate"]),
                float(content["weight_decay"]),
                None if rank is None else int(rank),
                None if lift is None else str(lift),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"no record of a parameter group ({type(error).__name__})") from None


def read_groups(content: Any) -> tuple[GroupRecord, ...] | None:
    """The records in a list of what `as_json` gave; None for anything else, as older run folders have."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return None
    try:
        return tuple(map(GroupRecord.read, content))
    except ValueError:
        return None


def _short(count: int) -> str:
    """A number of weights: 640, 12.3k, 4.56M."""
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.1f}k" if count < 1e6 else f"{count / 1e6:.2f}M"
