"""From streamed lines to micro-batches: tokens, padding, attention mask and labels; and the validation set.

    tokens of a document + EOS, cut at `max_length`, padded to it  ->  input_ids, attention_mask, labels

Padding is masked in the attention and ignored in the loss; a document that was cut has no EOS, as its end is not seen.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from peft_pretraining.data.blocks import as_it_is, end_workers, leave_signals_to_the_parent, useful_workers
from peft_pretraining.data.plain_text import PlainText, special_ids
from peft_pretraining.data.shards import DataError, Shard, document_text, log
from peft_pretraining.data.streaming import Document, DocumentStream, in_order_of_files
from peft_pretraining.distributed.process_group import ProcessGroup
from peft_pretraining.models.loss import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BAD_LINES_ALLOWED, _BAD_SHARE_ALLOWED = 100, 0.01
_EMPTY = "holds no text"
_DOCUMENTS_PER_AGREEMENT = 2048
_CHARACTERS_PER_TOKEN, _MARGIN = 6, 16
"""English has 4.4 characters per token of T5; the margin is in tokens."""
_WORD_END, _LONGEST_WORD = re.compile("(?<=[^ \\t\\n])[ \\t\\n]"), 10**6
"""What lies more than so many characters into a word changes no token before it."""


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that a sample can hold."""
    text = set(tokenizer.get_vocab().values()) - special_ids(tokenizer)
    return max(*text, tokenizer.eos_token_id, padding_id(tokenizer))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id would do: padding is neither attended to nor predicted."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def as_batch(input_ids: torch.Tensor, lengths: torch.Tensor) -> Batch:
    """A micro-batch of padded samples (batch, max_length), of which the first `lengths` (batch,) tokens count."""
    input_ids = input_ids.long()
    real = torch.arange(input_ids.shape[1]) < lengths[:, None]  # (batch, max_length)
    return {
        "input_ids": input_ids,
        "attention_mask": real.long(),
        "labels": input_ids.masked_fill(~real, IGNORED),
    }


class SampleMaker(Dataset):
    """Makes a batch of a list of `Document`s: DataLoader's workers hold it and call `__getitems__`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self._tokenizer, self._max_length = tokenizer, max_length
        self._ids: PlainText | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": None}  # made anew sooner than sent

    def __getitems__(self, documents: list[Document]) -> dict[str, Any]:
        """A `Batch`, and under `complaints` [shard, line, reason] of every document that became an empty sample."""
        input_ids, lengths, complaints = self.encode(documents)
        return {**as_batch(input_ids, lengths), "complaints": complaints}

    def encode(self, documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor, list[list[Any]]]:
        """Padded tokens (documents, max_length) int32, their numbers (documents,), and complaints."""
        texts, complaints = [], []
        for document in documents:
            text, reason = document_text(document.data)
            if text is None or not text.strip():
                complaints.append([document.shard, document.line, reason or _EMPTY])
            texts.append(text or "")
        encoded = self._text_ids(texts)
        rows = np.full((len(texts), self._max_length), padding_id(self._tokenizer), dtype=np.int32)
        lengths = np.zeros(len(texts), dtype=np.int64)
        for row, ids in enumerate(encoded):
            tokens = [*ids[: self._max_length], self._tokenizer.eos_token_id][: self._max_length]
            rows[row, : len(tokens)], lengths[row] = tokens, len(tokens)
        return torch.from_numpy(rows), torch.from_numpy(lengths), complaints

    def _text_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, at least as many as are needed; of a long text, those of its beginning.

        Half of C4's text lies beyond 256 tokens. A tokenizer splits text into words before anything else, so that text
        far enough behind a token does not change it.
        """
        self._ids = self._ids or PlainText(self._tokenizer)
        characters = _CHARACTERS_PER_TOKEN * (self._max_length + _MARGIN)
        beginnings = [_beginning(text, characters) for text in texts]
        found = list(self._ids(beginnings))
        short = [
            index
            for index, text in enumerate(texts)
            if len(beginnings[index]) < len(text) and len(found[index]) < self._max_length + _MARGIN
        ]
        for index, ids in zip(short, self._ids([texts[index] for index in short]), strict=True):
            found[index] = ids
        return found


def _beginning(text: str, characters: int) -> str:
    """At least so many characters of the text, up to the end of a word: of half a word, tokens are others."""
    if len(text) <= characters:
        return text
    end = _WORD_END.search(text, characters, _LONGEST_WORD + characters)
    return text[: end.start() if end else _LONGEST_WORD + characters]


class Complaints:
    """Counts lines that are no documents, names some, and ends the run when they are too many to be an accident."""

    def __init__(self, shards: Sequence[Shard]):
        self._shards, self._read, self._bad, self._empty = shards, 0, 0, 0

    def add(self, complaints: list[list[Any]], documents: int) -> None:
        self._read += documents
        for shard, line, reason in complaints:
            where = f"{self._shards[shard]}: line {line + 1} {reason}"
            if reason == _EMPTY:
                self._empty += 1
                if _worth_saying(self._empty):
                    log.warning("%s: a sample without targets (%d so far)", where, self._empty)
                continue
            self._bad += 1
            if _worth_saying(self._bad):  # as an error, which every rank logs: each sees only its own documents
                log.error("%s: passed over (%d so far)", where, self._bad)
            if self._bad > max(_BAD_LINES_ALLOWED, _BAD_SHARE_ALLOWED * self._read):
                raise DataError(f"{where}, as {self._bad} of {self._read} lines read: these are not the right files")


def _worth_saying(count: int) -> bool:
    return count <= 3 or set(str(count)[1:]) == {"0"}


class DocumentSampler(Sampler[list[Document]]):
    """The documents of this rank's micro-batches, from position `start` on, without end."""

    def __init__(self, stream: DocumentStream, start: int, batch_size: int, group: ProcessGroup):
        self.stream, self.start, self.batch_size, self.group = stream, start, batch_size, group

    def __iter__(self) -> Iterator[list[Document]]:
        position = self.start
        while True:
            documents = self.stream.take(position + self.group.rank * self.batch_size, self.batch_size)
            position += self.batch_size * self.group.world_size
            self.stream.read_to(position)  # so that every rank knows the place where the micro-batch ends
            yield documents


def made_by_workers(
    maker: SampleMaker, documents: Iterable[list[Document]], workers: int, group: ProcessGroup
) -> Iterator[dict[str, Any]]:
    """What `maker` makes of each list, in their order, read ahead by worker processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers inherit it: one thread each
    workers = useful_workers(workers, group)
    loader = DataLoader(
        maker,
        batch_sampler=documents,
        collate_fn=as_it_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=group.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_parent,
    )
    try:
        return iter(loader)  # reads the first documents
    finally:
        atexit.register(end_workers)  # after the workers were started, to be called before what torch registers then


def training_batches(
    stream: DocumentStream,
    maker: SampleMaker,
    complaints: Complaints,
    *,
    start: int,
    batch_size: int,
    workers: int,
    group: ProcessGroup,
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, from position `start` of the stream."""
    for made in made_by_workers(maker, DocumentSampler(stream, start, batch_size, group), workers, group):
        complaints.add(made.pop("complaints"), batch_size)
        yield made


class ValidationSet:
    """The shortest beginning of the validation shards that holds `tokens` tokens, split over the ranks.

    Iterating gives this rank's batches, or None where another rank has one and this has not. Documents are tokenised
    the first time; their tokens stay in memory (4 bytes each, padding included).
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        maker: SampleMaker,
        *,
        tokens: int,
        batch_size: int,
        workers: int,
        group: ProcessGroup,
    ):
        self._shards, self._maker, self._tokens = shards, maker, tokens
        self._batch_size, self._workers, self._group = batch_size, workers, group
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Per round: tokens (documents, max_length) int32 and lengths (documents,) of this rank's batch."""
        self._held = self._used = 0
        """Tokens and documents, over all ranks."""
        self._loader: Iterator[dict[str, Any]] | None = None
        self._complaints = Complaints(shards)
        self._complete = False

    def __iter__(self) -> Iterator[Batch | None]:
        done = 0
        while True:
            if done == len(self._kept) and not self._complete:
                self._extend()
            if done == len(self._kept):
                return
            input_ids, lengths = self._kept[done]
            yield as_batch(input_ids, lengths) if len(lengths) else None
            done += 1

    def _rounds(self) -> Iterator[list[Document]]:
        """This rank's documents of every round in which any rank has some."""
        documents = in_order_of_files(self._shards)
        while True:
            batches = [list(islice(documents, self._batch_size)) for _ in range(self._group.world_size)]
            if not batches[0]:
                return
            yield batches[self._group.rank]

    def _extend(self) -> None:
        """Tokenise some more rounds; the ranks agree after which document there are enough tokens."""
        if self._loader is None:
            self._loader = made_by_workers(self._maker, self._rounds(), self._workers, self._group)
        per_round = self._batch_size * self._group.world_size
        rounds = []
        for made in islice(self._loader, max(1, _DOCUMENTS_PER_AGREEMENT // per_round)):
            lengths = made["attention_mask"].sum(1)
            self._complaints.add(made["complaints"], len(lengths))
            rounds.append((made["input_ids"].int(), lengths))
        if rounds:  # as many on every rank
            enough = self._documents_needed([lengths for _, lengths in rounds])
            for index, (input_ids, lengths) in enumerate(rounds):
                mine = enough - index * per_round - self._group.rank * self._batch_size
                if enough > index * per_round:
                    self._kept.append((input_ids[: max(0, mine)], lengths[: max(0, mine)]))
        if not rounds or self._held >= self._tokens:
            self._complete, self._loader = True, None
            if self._held == self._used:
                raise DataError(f"{self._shards[0]} and the other validation shards hold nothing to predict")

    def _documents_needed(self, mine: list[torch.Tensor]) -> int:
        """How many documents of these rounds, over all ranks, are wanted; `mine`: lengths of this rank's, by round."""
        lengths = torch.zeros(len(mine), self._group.world_size, self._batch_size, dtype=torch.int64)
        for index, row in enumerate(mine):
            lengths[index, self._group.rank, : len(row)] = row
        lengths = self._group.all_reduce_sum(lengths.to(self._group.device)).cpu().flatten()
        lengths = lengths[lengths > 0]  # a document has its EOS at least; the others are places in the last round
        totals = self._held + lengths.cumsum(0)
        needed = min(int((totals < self._tokens).sum()) + 1, len(lengths))
        self._held, self._used = int(totals[needed - 1]), self._used + needed
        return needed
