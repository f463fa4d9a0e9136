"""How long a simulated update would take: the longest of what the device, its links and the host have to do.

Three rates are guesses, taken from runs on an H200: products reach half of the data sheet's rate, other kernels 80 % of
the memory's, and the host needs 12 µs to launch a kernel. Where a phase's kernels are shorter than that, the host is
what is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from peft_pretraining.report.footprint.counters import PHASES, Counts, Exchange, Kernel
from peft_pretraining.report.footprint.stand_ins import PER_NODE
from peft_pretraining.runtime.devices import Device

EFFICIENCY = 0.5
"""Of the rate of products, for matrices with sides of a thousand and more."""
MISALIGNED = 0.25
"""Of that, where rows are no multiples of 16 bytes: LLaMA 1B's width of 5461, or a vocabulary of 32,100."""
BANDWIDTH = 0.7
"""Of the memory's."""
LINK = 0.75
"""Of the links'."""
LAUNCH = 20e-6
"""Seconds for which the host is busy with an operator, Python and autograd included."""
WAIT = 400e-6
"""Seconds between the end of the device's work and the next kernel after the host has waited for it."""
SHORTEST = 2e-6
"""Seconds of the smallest kernel."""
_COLLECTIVE = 20e-6
"""Seconds before a collective moves its first byte."""
_EIGENVECTORS = {512: 0.0055, 1024: 0.013, 2048: 0.031, 4096: 0.123}
"""Seconds of a decomposition of so many rows in float64, measured on an H200."""
_STEPS = {"svd": 3.0, "eigh": 1.0, "qr": 0.2, "cholesky": 0.05, "triangular": 0.05}
"""Time of other decompositions in terms of that."""


@dataclass(frozen=True)
class Time:
    """Seconds of one phase."""

    device: float
    links: float
    host: float

    @property
    def total(self) -> float:
        """The three go on beside each other."""
        return max(self.device, self.links, self.host)

    @property
    def bound_by(self) -> str:
        return max((self.device, "device"), (self.links, "links"), (self.host, "host"))[1]


def times(counts: Counts, device: Device, matmul_precision: str | None = None) -> dict[str, Time]:
    """Seconds of an update by phase."""
    launches, waits = counts.launches(), counts.host_waits()
    found = {}
    for phase in PHASES:
        busy = sum(
            kernel_seconds(kernel, device, matmul_precision) * number
            for kernel, number in counts.kernels.items()
            if kernel.phase == phase
        )
        moved = sum(
            exchange_seconds(exchange, device) * number
            for exchange, number in counts.exchanges.items()
            if exchange.phase == phase
        )
        waited = waits[phase] * WAIT
        found[phase] = Time(busy + waited, moved, launches[phase] * LAUNCH + waited)
    return found


def kernel_seconds(kernel: Kernel, device: Device, matmul_precision: str | None = None) -> float:
    """Seconds of one kernel, the larger of its products' and its bytes'."""
    if kernel.decomposition is not None:
        kind, rows, columns = kernel.decomposition
        return _STEPS[kind] * _eigenvectors(min(rows, columns))
    efficiency = EFFICIENCY if kernel.aligned else EFFICIENCY * MISALIGNED
    products = kernel.flops / (device.tflops(kernel.dtype, matmul_precision) * 1e12 * efficiency)
    return max(SHORTEST, products, kernel.bytes / (device.bandwidth * 1e12 * BANDWIDTH))


def _eigenvectors(rows: int) -> float:
    """Seconds for a matrix of so many rows: between two that were measured by the power of the two."""
    sizes = sorted(_EIGENVECTORS)
    below = max([size for size in sizes[:-1] if size <= rows], default=sizes[0])
    above = sizes[sizes.index(below) + 1]
    first, second = _EIGENVECTORS[below], _EIGENVECTORS[above]
    if rows < sizes[0]:
        return max(first * rows / sizes[0], 1e-4)
    return first * (rows / below) ** (log(second / first) / log(above / below))


def exchange_seconds(exchange: Exchange, device: Device) -> float:
    """Seconds of one collective by rings: over the machine's links, or, where ranks of several machines meet, over the
    network."""
    ranks = len(exchange.ranks)
    if ranks < 2:
        return 0.0
    one_machine = len({rank // PER_NODE for rank in exchange.ranks}) == 1
    rate = (device.link if one_machine else device.network) * 1e9 * LINK
    passes = 2 if exchange.kind == "all_reduce" else 1
    return _COLLECTIVE + passes * (ranks - 1) / ranks * exchange.bytes / rate
