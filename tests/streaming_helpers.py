"""Shards of made-up documents, a small tokenizer, and ranks that are threads."""

from __future__ import annotations

import gzip
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from peft_pretraining.data.documents import DocumentSampler
from peft_pretraining.data.shards import find_local_shards
from peft_pretraining.data.streaming import Document, DocumentStream
from peft_pretraining.distributed import ProcessGroup

WORDS = "the of and to in water energy nation people great law small river mountain light house never again".split()
VOCABULARY = 320
TRAIN, VALIDATION = (37, 5, 41, 1, 30), (9, 14)
"""Documents of each shard."""


def made_up(count: int, seed: int = 0, words: tuple[int, int] = (2, 30)) -> list[str]:
    random = np.random.default_rng(seed)
    return [f"{number} " + " ".join(random.choice(WORDS, random.integers(*words))) for number in range(count)]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.writelines(line + "\n" for line in lines)
    return path


def write_shards(folder: Path, extension: str = ".json.gz", train=TRAIN, validation=VALIDATION) -> Path:
    """C4's names; every document is another, and the validation documents are none of the train documents."""
    for split, counts, seed in (("train", train, 1), ("validation", validation, 2)):
        texts = iter(made_up(sum(counts), seed))
        for index, count in enumerate(counts):
            lines = [json.dumps({"text": next(texts), "url": "http://x"}) for _ in range(count)]
            write_lines(folder / f"c4-{split}.{index:05d}-of-{len(counts):05d}{extension}", lines)
    return folder


def open_shards(folder: Path):
    problems: list[str] = []
    shards = find_local_shards(str(folder), "--base_dir", problems, [])
    assert not problems, problems
    return shards


def group(rank: int = 0, world_size: int = 1) -> ProcessGroup:
    return ProcessGroup(rank, world_size, rank, world_size, torch.device("cpu"))


def named(documents: list[Document]) -> list[tuple[int, int]]:
    return [(document.shard, document.line) for document in documents]


@dataclass
class Ranks:
    """The streams of all ranks of a run that was begun, or goes on, at one position."""

    shards: tuple
    world_size: int
    batch_size: int
    position: int = 0
    state: dict = field(default_factory=dict)
    window: int = 16
    seed: int = 3

    def __post_init__(self):
        groups = [group(rank, self.world_size) for rank in range(self.world_size)]
        self.streams = [
            DocumentStream(self.shards, self.seed, self.position, self.state, self.window)
            for _ in range(self.world_size)
        ]
        pairs = zip(self.streams, groups, strict=True)
        self._batches = [iter(DocumentSampler(stream, self.position, self.batch_size, g)) for stream, g in pairs]

    def update(self, accumulation: int = 1) -> list[tuple[int, int]]:
        """(shard, line) of all samples of the next update."""
        found = [item for _ in range(accumulation) for batches in self._batches for item in named(next(batches))]
        self.position += accumulation * self.batch_size * self.world_size
        self.state = self.streams[0].state_at(self.position)
        assert all(stream.state_at(self.position) == self.state for stream in self.streams)
        return found


class Threads:
    """Ranks that are threads of this process: `run(work)` calls `work(group)` on each and gives their results."""

    def __init__(self, world_size: int):
        self._size, self._barrier = world_size, threading.Barrier(world_size)
        self._given: dict[int, torch.Tensor] = {}

    def run(self, work) -> list:
        results = [None] * self._size

        def one(rank: int) -> None:
            results[rank] = work(_ThreadGroup(rank, self._size, rank, self._size, torch.device("cpu"), self))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


@dataclass(frozen=True)
class _ThreadGroup(ProcessGroup):
    threads: Threads

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.threads._given[self.rank] = tensor.clone()
        self.threads._barrier.wait(60)
        total = sum(self.threads._given.values())
        self.threads._barrier.wait(60)
        return total
