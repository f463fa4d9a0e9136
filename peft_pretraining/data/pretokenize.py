"""Turn documents into blocks of tokens, once, so that training only reads them.

    tokens of a document + EOS, tokens of the next + EOS, ...  ->  blocks of exactly `sequence_length` tokens

The remainder that fills no block is dropped. The result depends on the data, the tokenizer and the flags, not on the
number of processes or on how documents were batched. It is a folder:

    NAME/
      dataset_dict.json, train/, validation/    what `datasets.load_from_disk` reads: column `input_ids`
                                                (uint16 where all ids fit into it, otherwise int32)
      tokenizer.json, ...                       what `AutoTokenizer.from_pretrained` reads
      args.json                                 flags, vocabulary, and the counts of each split

written as NAME.tmp and renamed when complete. `slices.py` does the same in parts. Imported before the flags are
checked, so nothing heavy is on top.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from peft_pretraining.checkpoint.folder_lock import FolderInUse, FolderLock
from peft_pretraining.data.block_writer import write_dataset_dict
from peft_pretraining.data.json_rows import one_line
from peft_pretraining.data.pieces import Documents, open_pieces
from peft_pretraining.data.plain_text import special_ids
from peft_pretraining.data.pretokenize_config import PretokenizeConfig, result_path
from peft_pretraining.data.sources import Source
from peft_pretraining.data.splits import Writers, held_out_draw, train_documents, write_splits
from peft_pretraining.data.tally import Tally
from peft_pretraining.data.tokenizer import keep_sentencepiece, load_tokenizer, train_tokenizer
from peft_pretraining.flags import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pretokenize(config: PretokenizeConfig, source: Source) -> Path:
    """Write the whole result and return its folder; ConfigError, and nothing left behind, where the data is no good."""
    result = result_path(config, source)
    with building(result, config) as folder:
        writers, vocabulary = write_blocks(config, source, folder)
        complete(config, writers, vocabulary, folder)
    return result


class CannotWrite(RuntimeError):
    """The result cannot be written, in one line, such as for want of space. Nothing of it is left."""


@contextlib.contextmanager
def building(result: Path, config: PretokenizeConfig) -> Iterator[Path]:
    """A new folder that becomes `result` when all went well; otherwise it goes, with the folders made for it.

    Meanwhile nobody else builds the same: ConfigError that says who does.
    """
    temporary = result.with_name(result.name + ".tmp")
    new_folders = [folder for folder in temporary.parents if not os.path.exists(folder)]  # deepest first
    try:
        with _held(result, config):
            _recover(result)
            if result.exists() and not config.overwrite:  # made by somebody else meanwhile
                raise ConfigError([f"{result} exists already (--overwrite replaces it)"])
            _remove(temporary)  # of a run that was killed
            try:
                temporary.mkdir()
            except OSError as error:
                raise _not_writable(config, error) from error
            try:
                yield temporary
                _publish(temporary, result)
            except OSError as error:
                raise CannotWrite(
                    f"{result}: cannot be written ({error.strerror or one_line(error)}); nothing of it is kept"
                ) from error
            finally:
                _remove(temporary)
    except BaseException:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # it has something else in it by now, such as another slice
                folder.rmdir()
        raise


@contextlib.contextmanager
def _held(result: Path, config: PretokenizeConfig) -> Iterator[None]:
    """The right to build `result`: a lock in a folder beside it, which has to outlive the renaming of both."""
    folder = result.with_name(result.name + ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder).acquire()
    except FolderInUse as error:
        raise ConfigError([f"{result} is being made: {error}"]) from error
    except OSError as error:
        raise _not_writable(config, error) from error
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # the next one is in it already
            folder.rmdir()


def _not_writable(config: PretokenizeConfig, error: OSError) -> ConfigError:
    return ConfigError([f"--save_dir {config.save_dir}: cannot be written to ({error.strerror or one_line(error)})"])


def _remove(path: Path) -> None:
    """Whatever is there: folder, file or link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_blocks(config: PretokenizeConfig, source: Source, folder: Path) -> tuple[Writers, dict[str, Any]]:
    """Tokenizer and blocks of both splits, or of a slice of them; the finished writers and the vocabulary's numbers."""
    pieces, tokenizer = _open(config, source)
    if tokenizer is None:
        assert config.train_tokenizer is not None, "without a tokenizer, one is trained"
        tokenizer = train_tokenizer(_training_text(config, pieces), config.train_tokenizer, config.processes)
    try:
        tokenizer.save_pretrained(folder)
        if config.train_tokenizer is None:
            keep_sentencepiece(config.tokenizer_name, folder)
    except Exception as error:  # from Rust: without a type of its own
        raise OSError(one_line(error)) from error
    special, largest = tuple(sorted(special_ids(tokenizer))), max(tokenizer.get_vocab().values())
    writers = write_splits(config, pieces, folder, tokenizer.eos_token_id, special, max(largest, *special))
    return writers, {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}


def complete(
    config: PretokenizeConfig, writers: Writers, vocabulary: dict[str, Any], folder: Path, **more: dict[str, Any]
) -> None:
    """Check that there are blocks, and make the folder a dataset with its `args.json`; `more` is added to counts."""
    check_blocks(config, {split: (writer.documents, writer.tokens, writer.blocks) for split, writer in writers.items()})
    write_dataset_dict(folder, writers)
    arguments = {
        **dataclasses.asdict(config),
        "tokenizer": config.tokenizer_name,
        **vocabulary,
        "token_dtype": writers["train"].dtype,
        # Beside the counts, by which a resumed run knows its data: folders of before did not have it.
        "text_bytes": {
            split: round(w.text_bytes) if math.isfinite(w.text_bytes) else None for split, w in writers.items()
        },
        "largest_token_id": max(writer.largest_token_id for writer in writers.values()),
        "rows_passed_over": sum(writer.rows_passed_over for writer in writers.values()),
    }
    for split, writer in writers.items():
        counts = {"documents": writer.documents, "tokens": writer.tokens, "blocks": writer.blocks}
        arguments[split] = counts | more.get(split, {})
    (folder / "args.json").write_text(json.dumps(arguments, indent=2) + "\n")
    for split, writer in writers.items():
        if writer.tail:
            print(
                f"note: {split}: the last {writer.tail} of {writer.tokens} tokens fill no block and are not used",
                file=sys.stderr,
            )


def _whole(number: float) -> int | None:
    return round(number) if math.isfinite(number) else None


def _open(
    config: PretokenizeConfig, source: Source
) -> tuple[dict[str, list[Documents]], PreTrainedTokenizerBase | None]:
    """The source's splits, and the tokenizer unless it is to be trained; the problems of both together."""
    pieces, tokenizer, problems = {}, None, []
    try:
        pieces = open_pieces(source, config.dataset_config, config.text_field, config.max_document_mb)
    except ConfigError as error:
        problems += error.problems
    try:
        if config.train_tokenizer is None:
            tokenizer = load_tokenizer(config.tokenizer_name)
    except ConfigError as error:
        problems += error.problems
    if pieces and config.take is None and (config.num_shards or 1) > len(pieces["train"]):
        problems.append(
            f"--num_shards {config.num_shards}: the train split is divided by files, and has only "
            f"{len(pieces['train'])} (with --take it is divided by documents)"
        )
    if problems:
        raise ConfigError(problems)
    return pieces, tokenizer


def _publish(temporary: Path, result: Path) -> None:
    """Give the complete result its name; an older one goes only then."""
    old = _replaced(result)
    if result.exists():
        _remove(old)
        result.rename(old)
    temporary.rename(result)
    _remove(old)


def _recover(result: Path) -> None:
    """Give an older result its name back: a process that was killed while replacing it has left it without one."""
    old = _replaced(result)
    if old.exists() and not result.exists():
        old.rename(result)


def _replaced(result: Path) -> Path:
    return result.with_name(result.name + ".old")


def _training_text(config: PretokenizeConfig, pieces: dict[str, list[Documents]]) -> Iterator[str]:
    """Documents of the train split, but those to be held out. Rows that are none are counted later, with the blocks."""
    documents, count = train_documents(config, pieces["train"], Tally())
    progress = tqdm(documents, "reading for the tokenizer", count, unit=" documents", mininterval=1)
    if "validation" in pieces:
        return (document.text for document in progress)
    share = config.validation_fraction
    return (document.text for document in progress if held_out_draw(config.seed, document) > share)


def check_blocks(config: PretokenizeConfig, counts: dict[str, tuple[int, int, int]]) -> None:
    """ConfigError where a split has no block; `counts`: documents, tokens and blocks of each."""
    total = sum(documents for documents, _, _ in counts.values())
    if total == 0:
        raise ConfigError([f"--dataset {config.dataset}: holds no documents"])
    problems = [
        f"--sequence_length {config.sequence_length}: the {split} split's {documents} documents have only {tokens} "
        f"tokens, not one block (of {total} documents in all)"
        for split, (documents, tokens, blocks) in counts.items()
        if blocks == 0
    ]
    if problems:
        raise ConfigError(problems)
