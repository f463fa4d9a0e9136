"""Blocks of tokens in random access, in an order that is a pure function of (seed, epoch, position).

Position p of the run's endless stream of samples lies in epoch p // size, and the epoch's permutation says which sample
it is. Which rank reads it, and in which micro-batch, changes nothing: a run continued from position p on another number
of devices sees the samples it would have seen.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from peft_pretraining import rng
from peft_pretraining.data.folder import read_arguments, read_column
from peft_pretraining.data.mixed_order import Order
from peft_pretraining.data.shards import DataError
from peft_pretraining.distributed.process_group import ProcessGroup
from peft_pretraining.models.loss import Batch
from peft_pretraining.runtime.workers import die_with_parent

T = TypeVar("T")


class TokenBlocks(Dataset):
    """Samples of `max_length` tokens out of one split of a folder that `pretokenize.py` wrote.

    The Arrow files stay memory-mapped; a block longer than `max_length` is cut into pieces of it. ValueError or OSError
    where the folder is damaged, or is not what it says.

    >>> import json, tempfile
    >>> from peft_pretraining.data.block_writer import BlockWriter, write_dataset_dict
    >>> folder = Path(tempfile.mkdtemp())
    >>> for split in ("train", "validation"):
    ...     writer = BlockWriter(folder / split, length=8)
    ...     writer.add(np.arange(20, dtype=np.int32), documents=1)
    ...     writer.finish()
    >>> write_dataset_dict(folder, ["train", "validation"])
    >>> _ = (folder / "args.json").write_text(json.dumps({"sequence_length": 8}))
    >>> blocks = TokenBlocks(folder, "train", max_length=4)
    >>> len(blocks), blocks[3]
    (4, tensor([12, 13, 14, 15]))
    """

    def __init__(self, folder: str | Path, split: str, max_length: int):
        self.split = split
        self._origin = (folder, split, max_length)
        arguments = read_arguments(folder)
        self._block_length = arguments["sequence_length"]
        column = read_column(folder, split)
        expected = arguments.get(split, {}).get("blocks")
        if expected is not None and len(column) != expected:
            raise ValueError(f"split {split} has {len(column)} blocks instead of {expected}, as args.json says")
        self._chunks = [_rows(chunk, self._block_length, max_length) for chunk in column.chunks if len(chunk)]
        sizes = [len(chunk) for chunk in self._chunks]
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes

    @property
    def folder(self) -> str | Path:
        return self._origin[0]

    def __reduce__(self):
        return TokenBlocks, self._origin  # a worker that does not fork maps the files again instead of copying them

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])["input_ids"][0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch, (len(indices), max_length) int64: DataLoader calls this instead of `__getitem__`."""
        chunks = np.searchsorted(self._ends, indices, side="right")
        rows = [self._chunks[chunk][index - self._starts[chunk]] for chunk, index in zip(chunks, indices, strict=True)]
        return {"input_ids": torch.from_numpy(np.stack(rows).astype(np.int64))}

    def place(self, index: int) -> str:
        """Folder, split and block, counted from 0, that the sample is cut from."""
        row = index * self._origin[2] // self._block_length
        return f"{self.folder}: split {self.split}, row {row}"

    def largest_token_id(self, first_tokens: int) -> int:
        """Largest id among about the first `first_tokens` tokens."""
        largest, seen = -1, 0
        for chunk in self._chunks:
            largest = max(largest, int(chunk.max()))
            seen += chunk.size
            if seen >= first_tokens:
                break
        return largest


def _rows(chunk, block_length: int, max_length: int) -> np.ndarray:
    """One Arrow chunk of token lists as (rows, max_length), without a copy."""
    values = chunk.flatten()
    if values.null_count:
        raise ValueError("token ids are missing")
    values = values.to_numpy(zero_copy_only=True)
    if values.size != len(chunk) * block_length:
        raise ValueError(f"blocks are not all of {block_length} tokens, as args.json says")
    return values.reshape(-1, max_length)


class MixedBlocks(Dataset):
    """Several `TokenBlocks` of the same length, one after the other."""

    def __init__(self, parts: Sequence[TokenBlocks]):
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])["input_ids"][0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """As that of `TokenBlocks`."""
        rows = [self.parts[part].__getitems__([own])["input_ids"] for part, own in map(self._part_of, indices)]
        return {"input_ids": torch.cat(rows)}

    def place(self, index: int) -> str:
        part, own = self._part_of(index)
        return self.parts[part].place(own)

    def _part_of(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])


@dataclass(frozen=True)
class SampleOrder:
    """Which sample stands at which position.

    >>> order = SampleOrder(size=5, seed=42)
    >>> first, second = order.samples(np.arange(10)).reshape(2, 5).tolist()
    >>> sorted(first) == sorted(second) == [0, 1, 2, 3, 4], first == second
    (True, False)
    """

    size: int
    """Samples per epoch."""
    seed: int

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices at `positions` (int64) of the endless stream."""
        epochs, within = np.divmod(positions, self.size)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = rng.permute(within[here], self.size, rng.derive_seed(self.seed, "data order", int(epoch)))
        return result


class MicroBatchSampler(Sampler[list[int]]):
    """The sample indices of this rank's micro-batches, from `start` on, without end."""

    def __init__(self, order: Order, start: int, batch_size: int, accumulation: int, group: ProcessGroup):
        self.order, self.start = order, start
        self.batch_size, self.accumulation, self.group = batch_size, accumulation, group

    def __iter__(self) -> Iterator[list[int]]:
        per_micro_batch = self.batch_size * self.group.world_size
        mine = np.arange(self.batch_size) + self.group.rank * self.batch_size
        position = self.start
        while True:
            for _ in range(self.accumulation):
                yield self.order.samples(position + mine).tolist()
                position += per_micro_batch


def as_it_is(made: T) -> T:
    """For DataLoader: what a worker made is a batch already."""
    return made


def leave_signals_to_the_parent(worker: int) -> None:
    die_with_parent()
    # A scheduler signals the whole job; the training process decides when its workers end.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """At the exit of a process that failed: its workers, which ignore the signal that would end them, are killed.

    Without it the process would wait for them for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their deaths as failures
    for worker in multiprocessing.active_children():
        worker.kill()


def useful_workers(requested: int, group: ProcessGroup) -> int:
    """No more workers than this rank's share of the cores leaves beside its own process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(requested, max(1, cores // group.local_world_size - 1))


def training_batches(
    blocks: TokenBlocks | MixedBlocks,
    *,
    seed: int,
    start: int,
    batch_size: int,
    accumulation: int,
    workers: int,
    group: ProcessGroup,
    vocabulary: int | None = None,
    order: Order | None = None,
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, from position `start` of the stream, read ahead by worker processes.

    `order`: by default all blocks, epoch after epoch, as `seed` permutes them.

    `DataError` at a token id that is not below `vocabulary`, where that is given.
    """
    sampler = MicroBatchSampler(order or SampleOrder(len(blocks), seed), start, batch_size, accumulation, group)
    workers = useful_workers(workers, group)
    batches = iter(
        DataLoader(
            blocks,
            batch_sampler=sampler,
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=group.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_parent,
        )
    )
    # In this process: an exception in a worker comes back with its traceback.
    return (
        checked_ids(batch, blocks, indices, vocabulary) for batch, indices in zip(batches, iter(sampler), strict=False)
    )


def checked_ids(batch: Batch, blocks: TokenBlocks | MixedBlocks, indices: list[int], vocabulary: int | None) -> Batch:
    """The batch of the samples `indices`, if all of its ids are in the vocabulary; the folder may say so wrongly.

    Otherwise an embedding would fail in the middle of a step: on CUDA with nothing that names the data.
    """
    ids = batch["input_ids"]
    least, largest = (int(value) for value in torch.aminmax(ids))
    if least < 0 or (vocabulary is not None and largest >= vocabulary):
        wrong = least if least < 0 else largest
        place = blocks.place(indices[int((ids == wrong).any(1).nonzero()[0])])
        what = "is negative" if least < 0 else f"is beyond the model's vocabulary of {vocabulary}"
        raise DataError(f"{place}: token id {wrong} {what}")
    return batch


def evaluation_batches(
    blocks: TokenBlocks, *, max_samples: int, batch_size: int, group: ProcessGroup, vocabulary: int | None = None
) -> Iterator[Batch | None]:
    """The first `max_samples` samples, split over the ranks; None where a rank has no batch left but another has.

    Every rank gets the same number of items, so that they can agree on something after each. `DataError` as above.
    """
    samples = min(len(blocks), max_samples)
    starts = list(range(0, samples, batch_size))
    for first in range(0, len(starts), group.world_size):
        mine = first + group.rank
        if mine < len(starts):
            indices = list(range(starts[mine], min(starts[mine] + batch_size, samples)))
            yield checked_ids(blocks.__getitems__(indices), blocks, indices, vocabulary)
        else:
            yield None
