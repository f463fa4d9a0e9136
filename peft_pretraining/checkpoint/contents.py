"""What tensors a checkpoint holds, and whether they are those of a run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.safe_loading import TensorReader
from peft_pretraining.distributed.sharding import local
from peft_pretraining.nn.low_rank_linear import WEIGHT_REST

ONE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"
"""The beginning of torch.distributed.checkpoint's warning that a single process needs no process group."""


def describe(folder: Path) -> Metadata:
    """What tensors a checkpoint holds. Raises `ValueError`, `OSError`."""
    return TensorReader(folder / run_dir.TENSORS_DIR).read_metadata()


def named(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors by the names that a checkpoint has for them."""
    return {f"{part}.{name}": tensor for part, entries in tensors.items() for name, tensor in entries.items()}


def without_unsaved_rests(model: dict[str, Any], described: Metadata) -> dict[str, Any]:
    """A model's tensors without the rests of 16-bit weights that an older checkpoint does not have: they become 0."""
    new = [
        name for name in model if name.endswith(WEIGHT_REST) and f"model.{name}" not in described.state_dict_metadata
    ]
    for name in new:
        local(model[name]).zero_()
    return {name: tensor for name, tensor in model.items() if name not in new}


def compare(described: Metadata, tensors: dict[str, Any], on_all_ranks: set[str]) -> None:
    """Raises `ValueError` where a checkpoint holds other tensors than the run; torch would leave some out unsaid."""
    stored = described.state_dict_metadata
    for name, tensor in named(tensors).items():
        if (found := stored.get(name)) is None:
            raise ValueError(f"it lacks {name}: another method, or other settings, wrote it")
        assert isinstance(found, TensorStorageMetadata), "a description of anything else is refused when it is read"
        if found.size != tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(found.size)} instead of {tuple(tensor.shape)}")
        if name.startswith("model.") and (dtype := found.properties.dtype) != tensor.dtype:
            raise ValueError(f"{name} is {dtype} instead of {tensor.dtype}: see --precision")
    if more := sorted(name for name in stored if name.startswith("model.") and name not in on_all_ranks):
        raise ValueError(f"it holds {more[0]}, which this run has not: another method, or other settings, wrote it")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warning that a single process needs no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        yield
