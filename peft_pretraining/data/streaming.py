"""Documents streamed from shards, in an order that is a pure function of the seed, from any position on.

    epoch's shards, permuted  ->  their lines, one after the other  ->  windows of 8192 lines, each permuted

One line is one sample, whatever it holds, so that positions depend on nothing but the files. Position p of the endless
stream belongs to the rank that reads position p of `data.blocks`: which rank, which worker and how many of them change
nothing. A `Cursor` says where a window begins in the files; with that of the window it was in, a run goes on there
without reading what lies before.

Each rank's process reads the lines (a thread, one window ahead) and hands those of its own samples to worker processes,
which parse, tokenise and pad them.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np

from peft_pretraining import rng
from peft_pretraining.data.lines import is_blank
from peft_pretraining.data.shards import DataError, Shard, log

T = TypeVar("T")

WINDOW = 8192
"""Consecutive documents that are shuffled among each other: 17 MB of C4, of which two are in memory."""


WINDOW_BYTES = 2**28
"""Bytes after which a window ends early: documents of C4 never come near it, but two windows must fit into memory."""


class Document(NamedTuple):
    """A line that stands for a sample, before it is parsed."""

    shard: int
    """Number of its shard, in the order of names."""
    line: int
    """Lines before it in the shard."""
    data: bytes


@dataclass(frozen=True)
class Cursor:
    """Where a window begins."""

    position: int = 0
    """Samples before it, in all epochs."""
    epoch: int = 0
    window: int = 0
    """Windows before it in its epoch."""
    shard: int = 0
    """Shards before its first line, in the epoch's order."""
    line: int = 0
    """Lines before it in that shard."""
    offset: int = 0
    """Bytes before it in that shard, uncompressed."""


class Window(NamedTuple):
    start: Cursor
    documents: list[Document]
    """In the order of the files."""
    end: Cursor
    """Where the next window begins."""


class _Placed(NamedTuple):
    document: Document
    place: int
    """Place of its shard in the order."""
    offset: int
    """Bytes before it in its shard."""


def in_order_of_files(shards: Sequence[Shard]) -> Iterator[Document]:
    """Every document once, as the files have them: blank lines are none."""
    return (found.document for found in _documents(shards, range(len(shards)), Cursor()))


def _documents(shards: Sequence[Shard], order: Sequence[int], start: Cursor) -> Iterator[_Placed]:
    """The documents of `shards` in `order`, from `start` on."""
    for place in range(start.shard, len(order)):
        shard = shards[order[place]]
        lines = shard.lines(start.offset, start.line) if place == start.shard else shard.lines()
        for count, line in enumerate(lines):
            if count == 0 and place + 1 < len(order):
                shards[order[place + 1]].fetch_ahead()
            if not is_blank(line.data):
                yield _Placed(Document(order[place], line.number, line.data), place, line.offset)


def read_windows(shards: Sequence[Shard], seed: int, size: int, start: Cursor) -> Iterator[Window]:
    """The windows of the endless stream from the one that begins at `start` on, of `size` documents each; the last of
    an epoch holds what is left."""
    cursor = start
    while True:
        order = rng.permute(np.arange(len(shards)), len(shards), rng.derive_seed(seed, "shard order", cursor.epoch))
        found = _documents(shards, order.tolist(), cursor)
        upcoming = next(found, None)
        if upcoming is None:
            raise DataError(f"{shards[0]} and the other {len(shards) - 1} training shards hold no documents")
        while upcoming is not None:
            documents, held = [], 0
            for placed in chain([upcoming], found):
                documents.append(placed.document)
                held += len(placed.document.data)
                if len(documents) == size or held >= WINDOW_BYTES:
                    break
            # One document further, so that the next window's place, an epoch's end included, is known already now.
            upcoming = next(found, None)
            position = cursor.position + len(documents)
            if upcoming is None:
                end = Cursor(position, cursor.epoch + 1)
            else:
                end = Cursor(
                    *(position, cursor.epoch, cursor.window + 1),
                    *(upcoming.place, upcoming.document.line, upcoming.offset),
                )
            yield Window(cursor, documents, end)
            cursor = end


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, of which a thread always has the next one ready, or is making it."""
    ready: queue.Queue[tuple[T, None] | tuple[None, BaseException]] = queue.Queue(maxsize=1)

    def work() -> None:
        try:
            for item in items:
                ready.put((item, None))
        except BaseException as error:  # for the thread that waits
            ready.put((None, error))

    threading.Thread(target=work, daemon=True).start()  # ends with the process: the stream has no end
    while True:
        found = ready.get()
        if found[1] is None:
            yield found[0]
            continue
        try:
            raise found[1]
        finally:
            del found  # or its error and this frame would hold each other, and with them whoever waits for it


class DocumentStream:
    """The documents of a run by their position, forwards only, from `position` on."""

    def __init__(
        self, shards: Sequence[Shard], seed: int, position: int = 0, state: dict[str, Any] | None = None, size: int = 0
    ):
        """`state` is what `state_at` gave; without one, or of other shards or another seed, the place of `position` is
        found by counting lines from the first."""
        self._shards, self._seed, self._size = shards, seed, size or WINDOW
        ordered = [[[shard.name, shard.size] for shard in shards], seed, self._size]
        self._fingerprint = hashlib.sha256(json.dumps(ordered).encode()).hexdigest()[:16]
        self._cursors = [self._first_cursor(position, state or {})]
        """Of every window read so far, and of the next."""
        self._windows: Iterator[Window] | None = None
        self._start = self._end = self._cursors[0].position
        self._documents: list[Document] = []

    def _first_cursor(self, position: int, state: dict[str, Any]) -> Cursor:
        if state.get("order") == self._fingerprint and state["position"] <= position:
            return Cursor(**{name: int(state[name]) for name in Cursor.__dataclass_fields__})
        if position:
            log.info("counting %d documents from the first shard on: nothing says where they end", position)
        return Cursor()

    def take(self, first: int, count: int) -> list[Document]:
        """The documents at positions `first` ... `first + count - 1`."""
        return [self._at(position) for position in range(first, first + count)]

    def _at(self, position: int) -> Document:
        self.read_to(position + 1)
        assert position >= self._start, "the stream only goes forwards"
        return self._documents[position - self._start]

    def read_to(self, position: int) -> None:
        """Have all windows that begin before `position` read."""
        while position > self._end:
            if self._windows is None:  # not before: a thread must not run while workers are forked
                self._windows = read_ahead(read_windows(self._shards, self._seed, self._size, self._cursors[0]))
            window = next(self._windows)
            self._start, self._end = window.start.position, window.end.position
            self._cursors.append(window.end)
            if position <= self._end:
                self._documents = self._shuffled(window)

    def _shuffled(self, window: Window) -> list[Document]:
        count = len(window.documents)
        seed = rng.derive_seed(self._seed, "window order", window.start.epoch, window.start.window)
        return [window.documents[index] for index in rng.permute(np.arange(count), count, seed)]

    def _cursor_at(self, position: int) -> Cursor:
        """Of the window that holds `position`, which was read to."""
        index = bisect.bisect_right(self._cursors, position, key=lambda cursor: cursor.position)
        return self._cursors[max(0, index - 1)]

    def epoch_at(self, position: int) -> int:
        """How often all documents were read before `position`."""
        return self._cursor_at(position).epoch

    def state_at(self, position: int) -> dict[str, Any]:
        """What a stream that goes on at `position` needs so as not to read what lies before."""
        return {**asdict(self._cursor_at(position)), "order": self._fingerprint}
