"""What a simulated update asks of a device, by phase: kernels, waits, copies, collectives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PHASES = ("before", "forward", "backward", "norm", "step")
"""Of an update: what comes before the first forward pass, and the four that follow."""


@dataclass(frozen=True)
class Kernel:
    """Operators that are alike in what they cost."""

    phase: str
    flops: int = 0
    """Of matrix products and attention; others count none."""
    bytes: int = 0
    """Read and written, each tensor once."""
    dtype: str = "float32"
    """Of the numbers multiplied."""
    aligned: bool = True
    """Whether rows of all factors are multiples of 16 bytes, without which tensor cores read them badly."""
    decomposition: tuple[str, int, int] | None = None
    """Its name and matrix shape, for what is no product: eigenvectors, singular vectors, QR."""


@dataclass(frozen=True)
class Exchange:
    """Collectives that are alike."""

    phase: str
    kind: str
    """all_reduce, reduce_scatter, all_gather, broadcast, ..."""
    bytes: int
    """Of the whole tensor: what one rank hands in (all-reduce, reduce-scatter) or gets (all-gather)."""
    ranks: tuple[int, ...]
    """The process ranks that take part."""


@dataclass
class Counts:
    """Of one update, or one part of it."""

    kernels: Counter[Kernel] = field(default_factory=Counter)
    exchanges: Counter[Exchange] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(phase, place in the code): times that the host waited for the device."""
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(phase, operator): launches."""

    def add(self, other: Counts, times: int = 1) -> None:
        for name in ("kernels", "exchanges", "waits", "operators"):
            mine, its = getattr(self, name), getattr(other, name)
            for key, number in its.items():
                mine[key] += times * number

    def launches(self) -> dict[str, int]:
        """Kernel launches by phase."""
        return self._by_phase({key: number for key, number in self.operators.items()})

    def host_waits(self) -> dict[str, int]:
        """Waits by phase."""
        return self._by_phase(self.waits)

    def exchanged(self) -> dict[str, int]:
        """Bytes by collective; a handful of numbers is not counted."""
        found: Counter[str] = Counter()
        for exchange, number in self.exchanges.items():
            if exchange.bytes > SCALARS:
                found[exchange.kind] += exchange.bytes * number
        return dict(found)

    def _by_phase(self, counted: dict[tuple[str, str], int]) -> dict[str, int]:
        return {phase: sum(number for (its, _), number in counted.items() if its == phase) for phase in PHASES}


SCALARS = 64
"""Bytes up to which a collective is not worth counting: a few scalars."""
