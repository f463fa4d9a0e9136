"""Tokenising a large corpus in slices, each by a process or a Slurm task of its own, and joining them without a copy.

    NAME.slices/00003-of-00256/     one slice: train/, validation/, tokenizer, slice.json; complete once it has its name
    NAME/                           after `--merge`: as `pretokenize` writes it, of the slices' own Arrow files

Merged, both splits have the documents, in their order, and the numbers of documents, tokens and blocks that a single
command would give them; only blocks begin elsewhere. Each slice begins a block, and the tokens at the ends of slices
that fill none are joined, in the slices' order, into the last blocks. All of it is a function of data, flags and the
number of slices, whichever were made first, side by side, or twice.

The Arrow files are hard links: no byte is copied, NAME may be moved, and NAME.slices deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peft_pretraining.data.block_writer import BlockWriter
from peft_pretraining.data.pretokenize import building, check_blocks, complete, write_blocks
from peft_pretraining.data.pretokenize_config import PretokenizeConfig, result_path, slice_path
from peft_pretraining.data.sources import Source
from peft_pretraining.data.tokenizer import SENTENCEPIECE
from peft_pretraining.flags import ConfigError

DESCRIPTION = "slice.json"
SPLITS = ("train", "validation")
_SHARED = (
    *("dataset_config", "text_field", "from_json", "take", "sequence_length", "validation_fraction", "seed"),
    "num_shards",
)
"""Flags that all slices must agree on. The folder's name has dataset and tokenizer, as far as they are not compared."""


def pretokenize_slice(config: PretokenizeConfig, source: Source) -> Path:
    """Write one slice and return its folder; nothing is done if it is there already. ConfigError as `pretokenize`."""
    assert config.shard is not None, "the command line says which slice"
    folder = slice_path(config, source, config.shard)
    if folder.exists() and not config.overwrite:
        if problems := list(_contradictions(folder, config)):
            raise ConfigError([f"{folder}: {problem} (--overwrite replaces it)" for problem in problems])
        print(f"note: slice {config.shard} is complete already (--overwrite makes it again)", file=sys.stderr)
        return folder
    with building(folder, config) as temporary:
        writers, vocabulary = write_blocks(config, source, temporary)
        description = {
            "flags": {name: getattr(config, name) for name in _SHARED},
            "vocabulary": {**vocabulary, "digest": _tokenizer_digest(temporary)},
            "source": _source_digest(source),
            "splits": {split: writers[split].describe() for split in SPLITS},
        }
        (temporary / DESCRIPTION).write_text(json.dumps(description) + "\n")
    return folder


def merge(config: PretokenizeConfig, source: Source) -> Path:
    """Join all slices and return the result's folder; ConfigError with a line for every slice that is no good."""
    assert config.num_shards is not None, "the command line says how many slices"
    problems: list[str] = []
    folders = [slice_path(config, source, shard) for shard in range(config.num_shards)]
    descriptions = [_checked(shard, folder, config, problems) for shard, folder in enumerate(folders)]
    if not problems:
        for shard, description in enumerate(descriptions):
            for name, what in (("vocabulary", "tokenizer"), ("source", "list of source files")):
                if description[name] != descriptions[0][name]:
                    problems.append(f"slice {shard}: made with another {what} than slice 0; make it again")
            own, first = (_dtype(each["splits"]["train"]) for each in (description, descriptions[0]))
            if own != first:
                problems.append(f"slice {shard}: its tokens are {own}, those of slice 0 {first}; make it again")
    if problems:
        raise ConfigError(problems)
    check_blocks(config, {split: _counts(config, descriptions, split) for split in SPLITS})
    result = result_path(config, source)
    with building(result, config) as folder:
        for file in folders[0].iterdir():
            if file.is_file() and file.name != DESCRIPTION:
                shutil.copy2(file, folder)
        writers, hard = {}, True
        for split in SPLITS:
            parts = [description["splits"][split] for description in descriptions]
            writers[split], linked = _join(folder / split, config.sequence_length, folders, parts)
            hard &= linked
        vocabulary = {key: value for key, value in descriptions[0]["vocabulary"].items() if key != "digest"}
        # In the counts, by which a resumed run knows its data: otherwise they equal those of an unsliced result.
        complete(config, writers, vocabulary, folder, **{split: {"slices": config.num_shards} for split in SPLITS})
    if not hard:
        print(
            f"warning: no hard links here: {result} refers to files in {folders[0].parent}, which must stay beside it",
            file=sys.stderr,
        )
    return result


def _counts(config: PretokenizeConfig, descriptions: list[dict[str, Any]], split: str) -> tuple[int, int, int]:
    """Documents, tokens and blocks that the joined split will have."""
    parts = [description["splits"][split] for description in descriptions]
    rest = sum(len(part["remainder"]) for part in parts)
    blocks = sum(part["blocks"] for part in parts) + rest // config.sequence_length
    return sum(part["documents"] for part in parts), sum(part["tokens"] for part in parts), blocks


def _join(folder: Path, length: int, folders: list[Path], parts: list[dict[str, Any]]) -> tuple[BlockWriter, bool]:
    """One split out of the slices' `parts`; whether all links are hard."""
    writer, hard = BlockWriter(folder, length, _dtype(parts[0])), True
    for slice_folder, part in zip(folders, parts, strict=True):
        hard &= writer.adopt(slice_folder / folder.name, part)
    for part in parts:
        writer.add(np.array(part["remainder"], dtype=np.int32), 0)
    writer.finish()
    return writer, hard


def _dtype(part: dict[str, Any]) -> str:
    """Of the numbers in a slice's files; older ones did not say."""
    return str(part.get("dtype", "int32"))


def _checked(shard: int, folder: Path, config: PretokenizeConfig, problems: list[str]) -> dict[str, Any]:
    """A slice's description; what is wrong with the slice is added to `problems`, as one line."""
    if not folder.is_dir():
        begun = folder.with_name(folder.name + ".tmp").is_dir()
        state = "is being made, or its command was killed" if begun else "is missing"
        problems.append(f"slice {shard} {state}: run the same command with --shard {shard} ({folder})")
        return {}
    found = list(_contradictions(folder, config)) or list(_damages(folder))
    if found:
        problems.append(f"slice {shard}: {'; '.join(found)} ({folder})")
        return {}
    return json.loads((folder / DESCRIPTION).read_text())


def _contradictions(folder: Path, config: PretokenizeConfig) -> Iterator[str]:
    """Flags with which a complete slice was made, where they differ from the present ones."""
    try:
        flags = json.loads((folder / DESCRIPTION).read_text())["flags"]
    except (OSError, ValueError, KeyError) as error:
        yield f"its {DESCRIPTION} cannot be read ({type(error).__name__})"
        return
    for name in _SHARED:
        if flags.get(name) != getattr(config, name):
            yield f"made with --{name} {flags.get(name)} instead of {getattr(config, name)}"


def _damages(folder: Path) -> Iterator[str]:
    """Arrow files of a complete slice that are not as they were written."""
    for split, part in json.loads((folder / DESCRIPTION).read_text())["splits"].items():
        for name, size in part["files"].items():
            file = folder / split / name
            if not file.is_file():
                yield f"{split}/{name} is missing"
            elif file.stat().st_size != size:
                yield f"{split}/{name} has {file.stat().st_size} bytes instead of {size}"


def _tokenizer_digest(folder: Path) -> str:
    """Of the files that say how text becomes tokens; a SentencePiece model lies there for others."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in SENTENCEPIECE:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _source_digest(source: Source) -> str:
    """Of the names and sizes of local files: a slice is a part of the list that its command found."""
    files = {split: [(file.name, file.stat().st_size) for file in files] for split, files in source.files.items()}
    return hashlib.sha256(json.dumps([source.origin if not files else "", files]).encode()).hexdigest()
