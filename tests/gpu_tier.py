"""Tests on a CUDA device: `pytest -m gpu tests`.

Without that, no test sees a GPU, so that the suite is the same on every machine. With it, those run that have the
fixture `device`, which is "cuda" then, or the mark `gpu`; others are for the CPU. A run computes on the GPU by itself
then, unless it is made within `on_cpu`.

In float64 the devices differ by the order of sums alone: losses agree to 1e-9, weights after a dozen updates to 1e-6.
What is resumed on a GPU ends with the same bits, as it does on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

DEVICE = "cpu"

LOSSES, WEIGHTS = 1e-9, 1e-6
"""What CUDA and the CPU may differ by, in float64."""


def asked_for(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr", default="")
    return "gpu" in expression and "not gpu" not in expression


def found() -> bool:
    import torch

    return torch.cuda.is_available()


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what can run on a GPU, if that is asked for; else drop what can run nowhere else."""
    global DEVICE
    if asked_for(config):
        DEVICE = "cuda"
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        return
    only = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=only)
    items[:] = [item for item in items if item not in only]


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Runs that are made within it compute on the CPU."""
    import torch

    from peft_pretraining.distributed import process_group

    original = process_group._device
    process_group._device = lambda local_rank: torch.device("cpu")
    try:
        yield
    finally:
        process_group._device = original
