"""Turn documents into blocks of tokens, once, so that training only reads them.

    tokens of a document + EOS, tokens of the next + EOS, ...  ->  blocks of exactly `sequence_length` tokens

The remainder that fills no block is dropped. The result depends on the data, the tokenizer and the flags, not on the
number of processes or on how documents were batched. It is a folder:

    NAME/
      dataset_dict.json, train/, validation/    what `datasets.load_from_disk` reads: column `input_ids`, int32
      tokenizer.json, ...                       what `AutoTokenizer.from_pretrained` reads
      args.json                                 flags, vocabulary, and the counts of each split

written as NAME.tmp and renamed when complete. `slices.py` does the same in parts. Imported before the flags are
checked, so nothing heavy is on top.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from peft_pretraining.data.block_writer import write_dataset_dict
from peft_pretraining.data.plain_text import special_ids
from peft_pretraining.data.pretokenize_config import PretokenizeConfig, result_path
from peft_pretraining.data.sources import Documents, Source, open_pieces
from peft_pretraining.data.splits import Writers, held_out_draw, train_documents, write_splits
from peft_pretraining.data.tokenizer import load_tokenizer, train_tokenizer
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


@contextlib.contextmanager
def building(result: Path, config: PretokenizeConfig) -> Iterator[Path]:
    """A new folder that becomes `result` when all went well; otherwise it goes, with the folders made for it."""
    temporary = result.with_name(result.name + ".tmp")
    new_folders = [folder for folder in temporary.parents if not os.path.exists(folder)]  # deepest first
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise ConfigError([f"--save_dir {config.save_dir}: cannot be written to ({error.strerror})"]) from error
        yield temporary
        _publish(temporary, result)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in new_folders:
            with contextlib.suppress(OSError):  # it has something else in it by now, such as another slice
                folder.rmdir()
        raise


def write_blocks(config: PretokenizeConfig, source: Source, folder: Path) -> tuple[Writers, dict[str, Any]]:
    """Tokenizer and blocks of both splits, or of a slice of them; the finished writers and the vocabulary's numbers."""
    pieces, tokenizer = _open(config, source)
    if tokenizer is None:
        tokenizer = train_tokenizer(_training_text(config, pieces), config.train_tokenizer, config.processes)
    tokenizer.save_pretrained(folder)
    writers = write_splits(config, pieces, folder, tokenizer.eos_token_id, tuple(sorted(special_ids(tokenizer))))
    return writers, {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}


def complete(
    config: PretokenizeConfig, writers: Writers, vocabulary: dict[str, Any], folder: Path, **more: dict[str, Any]
) -> None:
    """Check that there are blocks, and make the folder a dataset with its `args.json`; `more` is added to counts."""
    _check_blocks(config, writers)
    write_dataset_dict(folder, writers)
    arguments = {
        **dataclasses.asdict(config),
        "tokenizer": config.tokenizer_name,
        **vocabulary,
        "largest_token_id": max(writer.largest_token_id for writer in writers.values()),
    }
    for split, writer in writers.items():
        counts = {"documents": writer.documents, "tokens": writer.tokens, "blocks": writer.blocks}
        arguments[split] = counts | more.get(split, {})
    (folder / "args.json").write_text(json.dumps(arguments, indent=2) + "\n")


def _open(
    config: PretokenizeConfig, source: Source
) -> tuple[dict[str, list[Documents]], PreTrainedTokenizerBase | None]:
    """The source's splits, and the tokenizer unless it is to be trained; the problems of both together."""
    pieces, tokenizer, problems = {}, None, []
    try:
        pieces = open_pieces(source, config.dataset_config, config.text_field)
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
    old = result.with_name(result.name + ".old")
    if result.exists():
        shutil.rmtree(old, ignore_errors=True)
        result.rename(old)
    temporary.rename(result)
    shutil.rmtree(old, ignore_errors=True)


def _training_text(config: PretokenizeConfig, pieces: dict[str, list[Documents]]) -> Iterator[str]:
    """Documents of the train split, but those to be held out."""
    documents, count = train_documents(config, pieces["train"])
    progress = tqdm(documents, "reading for the tokenizer", count, unit=" documents", mininterval=1)
    if "validation" in pieces:
        return (document.text for document in progress)
    share = config.validation_fraction
    return (document.text for document in progress if held_out_draw(config.seed, document) > share)


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
