"""Turn documents into blocks of tokens, once, so that training only reads them.

    tokens of a document + EOS, tokens of the next + EOS, ...  ->  blocks of exactly `sequence_length` tokens

The remainder that fills no block is dropped. The result depends on the data, the tokenizer and the flags, not on the
number of processes or on how documents were batched. It is a folder:

    NAME/
      dataset_dict.json, train/, validation/    what `datasets.load_from_disk` reads: column `input_ids`, int32
      tokenizer.json, ...                       what `AutoTokenizer.from_pretrained` reads
      args.json                                 flags, vocabulary, and the counts of each split

written as NAME.tmp and renamed when complete. Imported before the flags are checked, so nothing heavy is on top.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from peft_pretraining.config import DEFAULT_TOKENIZER, setting
from peft_pretraining.data.block_writer import BlockWriter, write_dataset_dict
from peft_pretraining.data.sources import Documents, Source, open_source
from peft_pretraining.data.tokenizer import Encoded, encode_documents, load_tokenizer, train_tokenizer
from peft_pretraining.flags import ConfigError, boolean, integer, number, positive_int, string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Writers = dict[str, BlockWriter]  # by split

MOST_PROCESSES = 64  # one process reads and writes for all of them; with many more it would hold them up


def _open_fraction(text: str) -> float:
    if not 0 < (value := number(text)) < 1:
        raise ValueError("must lie between 0 and 1")
    return value


@dataclass(frozen=True)
class PretokenizeConfig:
    """Every flag of `pretokenize.py`."""

    dataset: str | None = setting(
        None, string, "hub name (c4 is allenai/c4), folder saved by `datasets`, or path or wildcard of local files"
    )
    dataset_config: str | None = setting(None, string, "configuration of the hub dataset, such as en")
    text_field: str = setting("text", string, "column that holds the text (default: text)")
    from_json: bool = setting(False, boolean, "read local files as JSON, whatever their extension")
    take: int | None = setting(None, positive_int, "use only so many documents of the train split (default: all)")
    tokenizer: str | None = setting(None, string, f"hub name or folder of a tokenizer (default: {DEFAULT_TOKENIZER})")
    train_tokenizer: int | None = setting(
        None, positive_int, "train a byte-level BPE of so many entries on the train text, instead of --tokenizer"
    )
    sequence_length: int = setting(512, positive_int, "tokens per block (default: 512)")
    validation_fraction: float = setting(
        0.005,
        _open_fraction,
        "share of documents held out where the source has no validation split; at least a block (default: 0.005)",
    )
    seed: int = setting(42, integer, "seed of the choice of validation documents (default: 42)")
    num_cpu: int | None = setting(
        None, positive_int, f"tokenising processes (default: the usable cores, at most {MOST_PROCESSES})"
    )
    save_dir: str | None = setting(None, string, "folder in which the result's folder is made")
    overwrite: bool = setting(False, boolean, "replace an existing result, once the new one is complete")

    @property
    def tokenizer_name(self) -> str:
        return f"bpe{self.train_tokenizer}" if self.train_tokenizer else self.tokenizer or DEFAULT_TOKENIZER

    @property
    def processes(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.num_cpu or min(cores, MOST_PROCESSES)


def result_path(config: PretokenizeConfig, source: Source) -> Path:
    """`SAVE_DIR/{dataset}_{config}_{tokenizer}_{length}`."""
    tokenizer = config.tokenizer_name
    tokenizer = Path(tokenizer).resolve().name if Path(tokenizer).is_dir() else tokenizer.replace("/", "_")
    parts = (source.name, config.dataset_config, tokenizer, str(config.sequence_length))
    return Path(config.save_dir, "_".join(part for part in parts if part))


def pretokenize(config: PretokenizeConfig, source: Source) -> Path:
    """Write the whole result and return its folder; ConfigError, and nothing left behind, where the data is no good."""
    result = result_path(config, source)
    temporary = result.with_name(result.name + ".tmp")
    new_folders = [folder for folder in temporary.parents if not os.path.exists(folder)]  # deepest first
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        splits, tokenizer = _open(config, source)
        _create(temporary, config)
        if tokenizer is None:
            documents = _training_text(config, splits)
            tokenizer = train_tokenizer(documents, config.train_tokenizer, config.processes)
        tokenizer.save_pretrained(temporary)
        writers = _write_splits(config, splits, temporary, tokenizer.eos_token_id)
        _check_blocks(config, writers)
        write_dataset_dict(temporary, writers)
        _write_arguments(config, tokenizer, writers, temporary)
        _publish(temporary, result)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in new_folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    return result


def _open(config: PretokenizeConfig, source: Source) -> tuple[dict[str, Documents], PreTrainedTokenizerBase | None]:
    """The source's splits, and the tokenizer unless it is to be trained; the problems of both together."""
    splits, tokenizer, problems = {}, None, []
    try:
        splits = open_source(source, config.dataset_config, config.text_field)
    except ConfigError as error:
        problems += error.problems
    try:
        if config.train_tokenizer is None:
            tokenizer = load_tokenizer(config.tokenizer_name)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    if config.take is not None:
        whole = splits["train"]
        splits["train"] = lambda: itertools.islice(whole(), config.take)
    return splits, tokenizer


def _create(folder: Path, config: PretokenizeConfig) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError([f"--save_dir {config.save_dir}: cannot be written to ({error.strerror})"]) from error


def _publish(temporary: Path, result: Path) -> None:
    """Give the complete result its name; an older one goes only then."""
    old = result.with_name(result.name + ".old")
    if result.exists():
        shutil.rmtree(old, ignore_errors=True)
        result.rename(old)
    temporary.rename(result)
    shutil.rmtree(old, ignore_errors=True)


def _draws(seed: int, first: int, count: int) -> np.ndarray:
    """A number in [0, 1] for each of `count` documents from number `first` on; a function of seed and number alone."""
    from peft_pretraining.rng import derive_seed

    return np.array([derive_seed(seed, "validation documents", index=first + i) for i in range(count)]) / 2**63


def _training_text(config: PretokenizeConfig, splits: dict[str, Documents]) -> Iterator[str]:
    """Documents of the train split, but those to be held out."""
    documents = tqdm(splits["train"](), "reading for the tokenizer", config.take, unit=" documents", mininterval=1)
    if "validation" in splits:
        return iter(documents)
    share = config.validation_fraction
    return (text for number, text in enumerate(documents) if _draws(config.seed, number, 1)[0] > share)


def _writers(config: PretokenizeConfig, folder: Path) -> Writers:
    return {split: BlockWriter(folder / split, config.sequence_length) for split in ("train", "validation")}


def _write_splits(config: PretokenizeConfig, splits: dict[str, Documents], folder: Path, eos_id: int) -> Writers:
    """Tokenise and write both splits."""

    def encoded(split: str) -> Iterator[Encoded]:
        total = config.take if split == "train" else None
        with tqdm(desc=f"tokenising {split}", total=total, unit=" documents", mininterval=1) as progress:
            tokens = 0
            for batch in encode_documents(splits[split](), folder, eos_id, config.processes):
                yield batch
                tokens += batch.ids.size
                progress.set_postfix(tokens=f"{tokens:,}", refresh=False)
                progress.update(len(batch.lengths))

    if "validation" not in splits:
        return _write_held_out(config, lambda: encoded("train"), folder)
    if config.validation_fraction != PretokenizeConfig.validation_fraction:
        print("warning: --validation_fraction has no effect: the data has a validation split", file=sys.stderr)
    writers = _writers(config, folder)
    for split, writer in writers.items():
        for batch in encoded(split):
            writer.add(batch.ids, len(batch.lengths))
        writer.finish()
    return writers


def _write_held_out(config: PretokenizeConfig, encoded: Callable[[], Iterator[Encoded]], folder: Path) -> Writers:
    """Documents whose draw is at most the share go to validation, whole; all others to train, in their order.

    If that share holds less than one block, it grows to the smallest that holds one, and everything is read again. Only
    small data, or documents longer than most of it, ever need that.
    """
    share = config.validation_fraction
    while True:
        writers = _writers(config, folder)
        enough, first = _SmallestShare(config.sequence_length), 0
        for batch in encoded():
            draws = _draws(config.seed, first, len(batch.lengths))
            held_out = draws <= share
            token_held_out = np.repeat(held_out, batch.lengths)
            writers["train"].add(batch.ids[~token_held_out], int((~held_out).sum()))
            writers["validation"].add(batch.ids[token_held_out], int(held_out.sum()))
            enough.add(draws, batch.lengths)
            first += len(batch.lengths)
        for writer in writers.values():
            writer.finish()
        if writers["validation"].blocks or enough.share <= share:
            return writers
        share = enough.share
        print("note: the validation share holds less than one block; reading again with a larger one", file=sys.stderr)
        for split in writers:
            shutil.rmtree(folder / split)


class _SmallestShare:
    """The smallest share of the documents seen so far that holds `tokens` tokens (or all, if they are too few)."""

    def __init__(self, tokens: int):
        self._needed, self._held = tokens, 0
        self._smallest: list[tuple[float, int]] = []  # heap of (-draw, length): the largest draw on top

    def add(self, draws: np.ndarray, lengths: np.ndarray) -> None:
        for draw, length in zip(draws.tolist(), lengths.tolist(), strict=True):
            heapq.heappush(self._smallest, (-draw, length))
            self._held += length
            while self._held - self._smallest[0][1] >= self._needed:
                self._held -= heapq.heappop(self._smallest)[1]

    @property
    def share(self) -> float:
        return -self._smallest[0][0] if self._smallest else 0.0


def _check_blocks(config: PretokenizeConfig, writers: Writers) -> None:
    documents = sum(writer.documents for writer in writers.values())
    if documents == 0:
        raise ConfigError([f"--dataset {config.dataset}: holds no documents"])
    problems = [
        f"--sequence_length {config.sequence_length}: the {split} split's {writer.documents} documents have only "
        f"{writer.tokens} tokens, not one block (of {documents} documents in all)"
        for split, writer in writers.items()
        if writer.blocks == 0
    ]
    if problems:
        raise ConfigError(problems)


def _write_arguments(
    config: PretokenizeConfig, tokenizer: PreTrainedTokenizerBase, writers: Writers, folder: Path
) -> None:
    arguments = {
        **dataclasses.asdict(config),
        "tokenizer": config.tokenizer_name,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "largest_token_id": max(writer.largest_token_id for writer in writers.values()),
    }
    for split, writer in writers.items():
        arguments[split] = {"documents": writer.documents, "tokens": writer.tokens, "blocks": writer.blocks}
    (folder / "args.json").write_text(json.dumps(arguments, indent=2) + "\n")
