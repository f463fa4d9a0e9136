"""`--eval_datasets NAME=FOLDER,...`: validation on several sets, checked against the run's model and data.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from peft_pretraining.data.folder import read_arguments
from peft_pretraining.data.mixture import sources_of
from peft_pretraining.flags import comma_separated
from peft_pretraining.models import model_config

if TYPE_CHECKING:
    from peft_pretraining.config.sections import Config
    from peft_pretraining.config.validate import FileFacts

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_TAKEN = ("loss", "perplexity", "tokens", "bits_per_byte")
"""Of the run's own validation set."""


def named_folders(text: str) -> tuple[str, ...]:
    """Of a flag: `NAME=FOLDER` entries. Raises ValueError for what is none, or twice the same name.

    >>> named_folders("wiki=data/wiki, news=data/news")
    ('wiki=data/wiki', 'news=data/news')
    """
    entries = comma_separated(text)
    names = [entry.partition("=")[0] for entry in entries]
    for name, entry in zip(names, entries, strict=True):
        if not _NAME.fullmatch(name) or name in _TAKEN or not entry.partition("=")[2]:
            raise ValueError(f"must be NAME=FOLDER, comma-separated, not {entry!r}")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"has two sets of the name {doubled[0]}")
    return tuple(entries)


def pairs(entries: tuple[str, ...]) -> dict[str, str]:
    """Folders by name."""
    return {name: folder for name, _, folder in (entry.partition("=") for entry in entries)}


def check(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """What the folders say of themselves must fit the model, the sequences and the run's own tokenizer."""
    sources = [] if config.data.dataset_path is None else _names_of_sources(config.data.dataset_path)
    for name, folder in pairs(config.data.eval_datasets).items():
        where = f"--eval_datasets {name}={folder}"
        if name in sources:
            problems.append(f"{where}: a source of --dataset_path has this name")
        if not os.path.isdir(folder):
            problems.append(f"{where}: no such folder")
            continue
        try:
            arguments = read_arguments(folder)
        except (OSError, ValueError) as error:
            problems.append(f"{where} was not written by pretokenize.py: {' '.join(str(error).split())}")
            continue
        problems += [f"{where}: {problem}" for problem in _contradictions(arguments, config, facts)]
        ours = facts.data.get("tokenizer", facts.tokenizer)
        if ours is not None and arguments.get("tokenizer") != ours:
            warnings.append(
                f"{where} was tokenised with {arguments.get('tokenizer')}, the run's data with {ours}: unless these "
                "are the same tokenizer, its perplexity says nothing"
            )


def _names_of_sources(dataset_path: str) -> list[str]:
    """Of a mixture, whose validation sets have them."""
    try:
        sources = sources_of(dataset_path)
    except ValueError:  # said of --dataset_path
        return []
    return [source.name for source in sources] if len(sources) > 1 else []


def _contradictions(arguments: dict[str, Any], config: Config, facts: FileFacts) -> list[str]:
    length, block = config.data.max_length, arguments["sequence_length"]
    problems = []
    if length and block % length:
        problems.append(f"its blocks of {block} tokens cannot be cut into pieces of {length} (--max_length)")
    largest = arguments.get("largest_token_id")
    if facts.model is not None and largest is not None:
        vocabulary = model_config.vocabulary_size(facts.model)
        if largest >= vocabulary:
            problems.append(f"token id {largest} is beyond the model's vocabulary of {vocabulary}")
    if config.data.document_mask and arguments.get("eos_token_id") is None:
        problems.append("it does not say what documents end with (args.json has no eos_token_id; --document_mask)")
    for what in ("vocab_size", "eos_token_id"):
        ours, theirs = facts.data.get(what), arguments.get(what)
        if ours is not None and theirs is not None and ours != theirs:
            problems.append(f"its tokenizer has {what} {theirs}, that of the run's data {ours}")
    return problems
