"""Reading files that somebody else may have made, without running anything that they name (docs/security.md).

torch.distributed.checkpoint's own reader unpickles a checkpoint's description as it is, and objects other than tensors
from the data files. Here the description is checked (tensor_description.py), nothing but tensors is read, and those by
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from peft_pretraining.checkpoint.plain_files import regular
from peft_pretraining.checkpoint.tensor_description import read_description

METADATA_FILE = ".metadata"

_NOT_DESCRIBED = "metadata is None; global metadata read failed: "


class TensorReader(dcp.FileSystemReader):
    """Reads a folder of torch.distributed.checkpoint that holds nothing but tensors."""

    def read_metadata(self, *_: Any, **keywords: Any) -> Metadata:
        """The checked description. (With `rank`, torch asks for one of each rank, which no checkpoint here has.)"""
        path = regular(Path(self.path) / METADATA_FILE)
        try:
            description = read_description(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for name in {place.relative_path for place in description.storage_data.values()}:
            regular(Path(self.path) / name)
        assert description.storage_meta is not None, "every description that is read has one"
        description.storage_meta.load_id = self.load_id
        return description


class _TensorsOnly(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is a pickled object: only tensors are read")


def load_tensors(tensors: dict[str, Any], folder: Path, distributed: bool | None = None) -> None:
    """Fill nested dictionaries of tensors, in place, from a folder that `torch.distributed.checkpoint` wrote.

    With `distributed` (by default, with a process group) all ranks call it together. Raises `ValueError`, one line with
    the reason, on all of them when a tensor is missing, has another shape or cannot be read on one of them.
    """
    if distributed is None:
        distributed = dist.is_available() and dist.is_initialized()
    try:
        with _without_tracebacks():
            dcp.load(tensors, storage_reader=TensorReader(folder), planner=_TensorsOnly(), no_dist=not distributed)
    except CheckpointException as error:  # no Exception; holds the errors of the ranks that failed
        raise ValueError(_first_reason(error)) from error


def _first_reason(error: CheckpointException) -> str:
    reason: BaseException = error
    while isinstance(reason, CheckpointException) and reason.failures:
        reason, _ = next(iter(reason.failures.values()))
    text = " ".join(str(reason).split()) or type(reason).__name__
    if text.startswith(_NOT_DESCRIBED):
        return text.removeprefix(_NOT_DESCRIBED)
    return text if isinstance(reason, ValueError | OSError) else f"{type(reason).__name__}: {text}"


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """torch logs a description that cannot be read with the whole stack; the reason follows on one line."""

    def without_stack(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    logger = logging.getLogger()  # the one that torch uses here
    logger.addFilter(without_stack)
    try:
        yield
    finally:
        logger.removeFilter(without_stack)
