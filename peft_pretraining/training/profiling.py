"""Peak memory, and traces of a few updates."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from peft_pretraining.training.tracking import log

_WAIT, _WARMUP = 2, 1  # updates before the trace: the first ones allocate and pick kernels


def reset_peak_memory(device: torch.device) -> None:
    """Begin to count anew, so that the peak of building is not the run's. On the CPU the kernel counts for good."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest number of bytes since `reset_peak_memory`: of tensors on a CUDA device, which its allocator gave out.

    On the CPU the largest that the process has had resident in memory since it began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_memory(device: torch.device) -> dict[str, int]:
    """The same for the log; on CUDA beside what the allocator reserved at most, which is what the device must have."""
    peaks = {"peak_memory_bytes": peak_memory_bytes(device)}
    if device.type == "cuda":
        peaks["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return peaks


def describe_peak(device: torch.device) -> str:
    """The same in words.

    >>> describe_peak(torch.device("cpu")).startswith("peak memory ")
    True
    """
    gib = {name: f"{size / 2**30:.2f} GiB" for name, size in peak_memory(device).items()}
    if device.type != "cuda":
        return f"peak memory {gib['peak_memory_bytes']} resident, building included"
    return f"peak memory {gib['peak_memory_bytes']} allocated, {gib['peak_reserved_bytes']} reserved"


class Profiler:
    """Traces `updates` updates of the run into `folder`, one file per rank; does nothing for 0."""

    def __init__(self, updates: int, folder: Path, rank: int):
        self._profiler = None
        if updates:
            self._path = folder / f"trace_rank{rank}.json"
            folder.mkdir(parents=True, exist_ok=True)
            schedule = torch.profiler.schedule(wait=_WAIT, warmup=_WARMUP, active=updates, repeat=1)
            self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
            self._profiler.start()

    def step(self) -> None:
        """Call after every update."""
        if self._profiler is not None:
            self._profiler.step()

    def stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self._path))
        log.info("profile written to %s (open it in chrome://tracing)", self._path)
