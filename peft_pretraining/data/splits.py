"""Which document goes where: into a slice of the work, and into the train or the validation split.

A document has two numbers: of the piece (file) it is in, and within that piece. They decide whether it is held out for
validation, so that a slice knows it without reading what comes before, and all slices together hold out what one
command would.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from peft_pretraining.data.block_writer import BlockWriter, token_dtype
from peft_pretraining.data.pieces import Documents
from peft_pretraining.data.pretokenize_config import PretokenizeConfig
from peft_pretraining.data.tally import Tally
from peft_pretraining.data.tokenizer import Encoded, encode_documents

Writers = dict[str, BlockWriter]  # by split


class Document(NamedTuple):
    piece: int
    number: int
    """0-based, within the piece."""
    text: str


def train_documents(
    config: PretokenizeConfig, pieces: list[Documents], tally: Tally
) -> tuple[Iterator[Document], int | None]:
    """The documents of the train split that this command is for, and how many they are, if that is known.

    Slices are runs of whole files. With `--take` they are runs of documents, for nothing says in which file a document
    of a given number is: a slice then reads past those before it, which is fast beside tokenising.
    """

    def read(first: int, end: int) -> Iterator[Document]:
        return (Document(p, n, text) for p in range(first, end) for n, text in enumerate(pieces[p](tally)))

    if config.take is None:
        return read(*_part(config, len(pieces))), None
    first, end = _part(config, config.take)
    return itertools.islice(read(0, len(pieces)), first, end), end - first


def _part(config: PretokenizeConfig, total: int) -> tuple[int, int]:
    """Where this command's part of `total` things in a row begins and ends."""
    shard, count = config.shard or 0, config.num_shards or 1
    return shard * total // count, (shard + 1) * total // count


def held_out_draw(seed: int, document: Document) -> float:
    """A number in [0, 1], a function of seed and the document's place alone."""
    from peft_pretraining.rng import derive_seed

    return derive_seed(seed, "validation documents", document.piece, document.number) / 2**63


def write_splits(
    config: PretokenizeConfig,
    pieces: dict[str, list[Documents]],
    folder: Path,
    eos_id: int,
    special: tuple[int, ...],
    largest_id: int,
) -> Writers:
    """Tokenise and write both splits. Of several slices the first writes the source's own validation split.

    largest_id: what says how many bytes each token takes.

    ConfigError where too many rows hold no document; of the others it is said how many were passed over.
    """

    def encoded(split: str, texts: Iterator[str], tally: Tally, total: int | None = None) -> Iterator[Encoded]:
        with tqdm(desc=f"tokenising {split}", total=total, unit=" documents", mininterval=1) as progress:
            tokens = 0
            for batch in encode_documents(texts, folder, eos_id, special, config.processes):
                yield batch
                tokens += batch.ids.size
                progress.set_postfix(tokens=f"{tokens:,}", refresh=False)
                progress.update(len(batch.lengths))
        tally.check()

    def train(tally: Tally, observe: Callable[[Document], None] = lambda document: None) -> Iterator[Encoded]:
        documents, total = train_documents(config, pieces["train"], tally)

        def texts() -> Iterator[str]:
            for document in documents:
                observe(document)
                yield document.text

        return encoded("train", texts(), tally, total)

    def new_writers() -> Writers:
        dtype = token_dtype(largest_id)
        return {split: BlockWriter(folder / split, config.sequence_length, dtype) for split in ("train", "validation")}

    if "validation" not in pieces:
        return _write_held_out(config, train, new_writers)
    if config.validation_fraction != PretokenizeConfig.validation_fraction:
        print("warning: --validation_fraction has no effect: the data has a validation split", file=sys.stderr)
    tallies = {"train": Tally(), "validation": Tally()}
    validation = (text for piece in pieces["validation"] for text in piece(tallies["validation"]))
    batches = {
        "train": train(tallies["train"]),
        "validation": encoded("validation", validation, tallies["validation"]) if not config.shard else (),
    }
    writers = new_writers()
    for split, writer in writers.items():
        for batch in batches[split]:
            writer.add(batch.ids, len(batch.lengths), float(batch.sizes.sum()))
        _finish(writer, tallies[split])
    return writers


def _finish(writer: BlockWriter, tally: Tally) -> None:
    """Complete a split, and say which rows were not used."""
    writer.rows_passed_over += tally.unusable
    writer.finish()
    for note in tally.notes():
        print(f"note: {note}", file=sys.stderr)


def _write_held_out(
    config: PretokenizeConfig,
    encoded: Callable[[Tally, Callable[[Document], None]], Iterator[Encoded]],
    new_writers: Callable[[], Writers],
) -> Writers:
    """Documents whose draw is at most the share go to validation, whole; all others to train, in their order.

    If that share holds less than one block, it grows to the smallest that holds one, and everything is read again. Only
    small data, or documents longer than most of it, ever need that; a slice, which sees but a part, never does it.
    Where whole documents would leave nothing to train on, such as a single long one, blocks are held out instead.
    """
    share = config.validation_fraction
    while True:
        writers, tally = new_writers(), Tally()
        enough = _SmallestShare(config.sequence_length)
        read_ahead: deque[float] = deque()

        def draw(document: Document, ahead: deque[float] = read_ahead) -> None:
            ahead.append(held_out_draw(config.seed, document))

        for batch in encoded(tally, draw):
            draws = np.array([read_ahead.popleft() for _ in batch.lengths])
            held_out = draws <= share
            for split, chosen in (("train", ~held_out), ("validation", held_out)):
                tokens = batch.ids[np.repeat(chosen, batch.lengths)]
                writers[split].add(tokens, int(chosen.sum()), float(batch.sizes[chosen].sum()))
            enough.add(draws, batch.lengths)
        blocks = {split: writer.tokens // config.sequence_length for split, writer in writers.items()}
        total = sum(writer.tokens for writer in writers.values())
        is_done = config.shard is not None or (blocks["validation"] and blocks["train"])
        by_blocks = not is_done and (not blocks["train"] or total - enough.held < config.sequence_length)
        by_blocks = by_blocks and total >= 2 * config.sequence_length
        if is_done or (not by_blocks and enough.share <= share):
            _finish(writers["train"], tally)
            writers["validation"].finish()
            return writers
        for writer in writers.values():
            writer.discard()
        if by_blocks:
            return _write_end_held_out(config, encoded, new_writers, total)
        share = enough.share
        print("note: the validation share holds less than one block; reading again with a larger one", file=sys.stderr)


def _write_end_held_out(
    config: PretokenizeConfig,
    encoded: Callable[[Tally, Callable[[Document], None]], Iterator[Encoded]],
    new_writers: Callable[[], Writers],
    total: int,
) -> Writers:
    """The last blocks of `total` tokens go to validation; a document that is cut counts in both splits."""
    blocks = total // config.sequence_length
    held_out = min(blocks - 1, max(1, round(config.validation_fraction * blocks)))
    print(
        f"note: the documents are too few to hold out whole ones: the last {held_out} of {blocks} blocks are the "
        "validation split",
        file=sys.stderr,
    )
    writers, tally, left = new_writers(), Tally(), (blocks - held_out) * config.sequence_length
    for batch in encoded(tally, lambda document: None):
        ends = np.cumsum(batch.lengths)
        starts = ends - batch.lengths
        share = np.clip((left - starts) / batch.lengths, 0, 1)  # of a document that is cut, in tokens
        text_bytes = float((share * batch.sizes).sum())
        writers["train"].add(batch.ids[:left], int((starts < left).sum()), text_bytes)
        writers["validation"].add(batch.ids[left:], int((ends > left).sum()), float(batch.sizes.sum()) - text_bytes)
        left = max(0, left - batch.ids.size)
    _finish(writers["train"], tally)
    writers["validation"].finish()
    return writers


class _SmallestShare:
    """The smallest share of the documents seen so far that holds `tokens` tokens (or all, if they are too few)."""

    def __init__(self, tokens: int):
        self._needed, self.held = tokens, 0
        """Tokens wanted, and tokens that the share holds."""
        self._smallest: list[tuple[float, int]] = []  # heap of (-draw, length): the largest draw on top

    def add(self, draws: np.ndarray, lengths: np.ndarray) -> None:
        for draw, length in zip(draws.tolist(), lengths.tolist(), strict=True):
            heapq.heappush(self._smallest, (-draw, length))
            self.held += length
            while self.held - self._smallest[0][1] >= self._needed:
                self.held -= heapq.heappop(self._smallest)[1]

    @property
    def share(self) -> float:
        return -self._smallest[0][0] if self._smallest else 0.0
