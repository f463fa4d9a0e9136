"""Where documents come from: local text, JSON and Parquet files, folders saved by `datasets`, the hub.

`find_source` looks at names only; `open_pieces` gives each split as a list of pieces (its files), which are read one by
one, and only the documents that are being read are in memory. Text and JSON files are read here rather than by
`datasets`, which types every column of a file (and stops where an unused one changes its type) and splits text at
exactly one empty line. Nothing heavy is imported before a source is opened.
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peft_pretraining.data.json_rows import Unusable, encodable, json_objects, json_rows, one_line
from peft_pretraining.data.lines import (
    BYTE_ORDER_MARK,
    LONGEST_DOCUMENT,
    MEGABYTE,
    LineReader,
    TooLong,
    files_only,
    open_binary,
)
from peft_pretraining.data.tally import Tally
from peft_pretraining.flags import ConfigError

__all__ = ["Documents", "Source", "encodable", "find_source", "json_objects", "one_line", "open_pieces"]

HUB_ALIASES = {"c4": "allenai/c4"}  # the plain name needs a loading script, which `datasets` no longer runs
SUPPORTED = (".txt", ".json", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
ROWS_PER_READ = 1000
ROWS_PER_PIECE = 1000  # of a folder saved by `datasets`, which is read at any row

Documents = Callable[[Tally], Iterator[str]]
"""Starts reading a piece of a split from its first document; rows that hold none are counted."""
Rows = Iterator[tuple[str, "str | Unusable"]]
"""Name of each row, such as `line 3`, and its text."""


@dataclass(frozen=True)
class Source:
    """What `--dataset` stands for, before anything of it is read."""

    kind: Literal["files", "saved", "hub"]
    name: str
    """Its part of the result's name."""
    origin: str
    """The folder that `datasets` saved, or the hub name; for files, what the user gave."""
    files: dict[str, list[Path]] = field(default_factory=dict)
    """Files of each split, sorted by name."""
    force_json: bool = False

    @property
    def has_fields(self) -> bool:
        """Whether `--text_field` chooses anything: plain text has nothing but text."""
        files = itertools.chain(*self.files.values())
        return self.kind != "files" or self.force_json or any(_format(file) != ".txt" for file in files)


def find_source(dataset: str, from_json: bool, problems: list[str], warnings: list[str]) -> Source | None:
    """Decide what `dataset` stands for. What is wrong with it is appended to `problems` (and None may come back)."""
    path = Path(dataset)
    if not from_json and any(os.path.isfile(path / marker) for marker in ("dataset_dict.json", "state.json")):
        return Source("saved", path.resolve().name, dataset)
    before = len(problems)
    if os.path.isdir(path):
        found = _files_in(path, from_json, problems)
        missing = (
            f"holds neither a dataset saved by `datasets` nor files of a known kind ({', '.join(SUPPORTED)}); "
            f"those of folders inside are read with a wildcard: '{path / '**' / '*.jsonl'}'"
        )
    elif glob.has_magic(dataset) and not os.path.isfile(path):
        names = sorted(glob.glob(dataset, recursive=True))
        found = files_only(map(Path, names), problems, "--dataset ")
        missing = "no file matches this wildcard"
        if names:  # folders, then
            missing += ", only folders: ** stands for any number of them"
    else:
        found = files_only([path], problems, "--dataset ") if os.path.lexists(path) else []
        missing = "file or folder not found"
        if not found and not from_json and _can_be_hub_name(dataset):
            hub_name = HUB_ALIASES.get(dataset, dataset)
            return Source("hub", hub_name, hub_name)
    if len(problems) > before:
        return None
    if not found:
        problems.append(f"--dataset {dataset}: {missing}")
        return None
    problems += _unreadable(found, from_json)
    return Source("files", _base_name(dataset), dataset, _splits_by_name(found, warnings), from_json)


def _files_in(folder: Path, from_json: bool, problems: list[str]) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        problems.append(f"--dataset {folder}: cannot be listed ({error.strerror})")
        return []
    return files_only((file for file in inside if from_json or _format(file) in SUPPORTED), problems, "--dataset ")


def _can_be_hub_name(dataset: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", dataset)) and _format(Path(dataset)) not in SUPPORTED


def _format(path: Path) -> str:
    """The extension that says how to read a file, once decompressed: `.json` for `a.json.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _unreadable(files: Iterable[Path], from_json: bool) -> list[str]:
    problems = []
    for file in files:
        kind = ".json" if from_json else _format(file)
        if kind not in SUPPORTED or (kind == ".parquet" and file.suffix in COMPRESSED):
            problems.append(
                f"--dataset {file}: unsupported extension (known: {', '.join(SUPPORTED)}; with .gz or .zst)"
            )
        elif file.suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
            problems.append(f"--dataset {file}: reading .zst files needs `pip install zstandard`")
    return problems


def _base_name(dataset: str) -> str:
    """`/data/c4/c4-train.*.json.gz` -> `c4-train`; a part that is nothing but a wildcard gives way to its folder."""
    for part in reversed(Path(os.path.abspath(dataset)).parts):
        name = Path(part)
        while name.suffix in (*SUPPORTED, *COMPRESSED):
            name = Path(name.stem)
        if cleaned := re.sub(r"\[[^]]*\]|[*?]", "", name.name).strip(" ._-"):
            return cleaned
    return "data"


def _splits_by_name(files: list[Path], warnings: list[str]) -> dict[str, list[Path]]:
    """As C4 names its files: `*train*` next to `*validation*`; otherwise everything is for training."""
    validation = [file for file in files if "validation" in file.name]
    train = [file for file in files if "train" in file.name and file not in validation]
    if not (train and validation):
        return {"train": files}
    if unused := [str(file) for file in files if file not in train and file not in validation]:
        warnings.append(f"not used, for neither train nor validation is in the name: {', '.join(unused)}")
    return {"train": train, "validation": validation}


def open_pieces(
    source: Source, dataset_config: str | None, text_field: str, max_document_mb: float = LONGEST_DOCUMENT
) -> dict[str, list[Documents]]:
    """The pieces of the `train` split and, where the source has it, of the `validation` split, in their order.

    A piece is a file, or so many rows of a folder saved by `datasets`. Documents of more than `max_document_mb` MB are
    passed over. ConfigError, then or while documents are read, for whatever keeps the data from being read: one line
    each.
    """
    limit = int(max_document_mb * MEGABYTE)
    if source.kind == "files":
        return {
            split: [partial(_documents_of_file, file, text_field, source.force_json, limit) for file in files]
            for split, files in source.files.items()
        }
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its warnings for every retry would bury the one line that counts
    try:
        if source.kind == "saved":
            data = datasets.load_from_disk(source.origin)
        else:  # always streamed: nothing is downloaded but what is used, and nothing is copied to a cache first
            data = datasets.load_dataset(source.origin, dataset_config, streaming=True)
    except Exception as error:  # unknown name, missing configuration, no network: each with exceptions of its own
        where = "no such path, and not loadable from the hub" if source.kind == "hub" else "cannot be loaded"
        raise ConfigError([f"--dataset {source.origin}: {where} ({one_line(error)})"]) from error
    splits = data if isinstance(data, dict) else {"train": data}
    if "train" not in splits:
        raise ConfigError([f"--dataset {source.origin}: has no split named train, only {', '.join(splits)}"])
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    chosen = {"train": "train", "validation": held_out} if held_out else {"train": "train"}
    pieces = _pieces_of_rows if source.kind == "saved" else _pieces_of_stream
    origin = f"--dataset {source.origin}"
    return {split: pieces(origin, splits[name], text_field, limit) for split, name in chosen.items()}


def _pieces_of_rows(origin: str, dataset: Any, text_field: str, limit: int) -> list[Documents]:
    def rows(first: int) -> Rows:
        part = dataset.select(range(first, min(first + ROWS_PER_PIECE, len(dataset))))
        return _rows_of_dataset(part, text_field, first)

    return [partial(_texts, origin, partial(rows, first), limit) for first in range(0, len(dataset), ROWS_PER_PIECE)]


def _pieces_of_stream(origin: str, dataset: Any, text_field: str, limit: int) -> list[Documents]:
    count = dataset.num_shards
    parts = [dataset.shard(count, index) for index in range(count)] if count > 1 else [dataset]
    return [partial(_texts, origin, partial(_rows_of_dataset, part, text_field), limit) for part in parts]


def _texts(origin: str, rows: Callable[[], Rows], limit: int, tally: Tally) -> Iterator[str]:
    """The rows that are text, in their order. The others are counted.

    Whatever fails while reading becomes one line that says where.
    """
    reading = rows()
    while True:
        try:
            name, text = next(reading)
        except StopIteration:
            return
        except Exception as error:  # files, decompressors, pyarrow and the hub raise exceptions of their own
            raise ConfigError([f"{origin}: {one_line(error)}"]) from error
        if isinstance(text, str) and len(text) > limit:
            text = Unusable("is longer than --max_document_mb allows")
        if isinstance(text, Unusable):
            tally.pass_over(origin, name, text)
        else:
            tally.use(text)
            yield encodable(text)


def _text_or_not(number: int, value: Any) -> tuple[str, str | Unusable]:
    name = f"document {number}"
    return name, value if isinstance(value, str) else Unusable(f"is not text but {type(value).__name__}")


def _missing_field(text_field: str, columns: Iterable[str]) -> ValueError:
    return ValueError(f"no --text_field {text_field!r} among the columns {', '.join(map(repr, columns))}")


def _rows_of_dataset(dataset: Any, text_field: str, first: int = 0) -> Rows:
    if text_field in (dataset.column_names or ()):  # a stream may not know its columns before it is read
        dataset = dataset.select_columns([text_field])
    number = first
    for batch in dataset.iter(batch_size=ROWS_PER_READ):
        if text_field not in batch:
            raise _missing_field(text_field, batch)
        for value in batch[text_field]:
            number += 1
            yield _text_or_not(number, value)


def _documents_of_file(file: Path, text_field: str, force_json: bool, limit: int, tally: Tally) -> Iterator[str]:
    readers = {".txt": _text_rows, ".parquet": _parquet_rows}
    reader = _json_rows if force_json else readers.get(_format(file), _json_rows)
    return _texts(str(file), partial(reader, file, text_field, limit), limit, tally)


def _text_rows(path: Path, text_field: str, limit: int) -> Rows:
    """Documents are separated by blank lines; the lines of one document stay as they are."""
    with LineReader(open_binary(path), limit) as lines:
        number = 0
        for blank, group in itertools.groupby(_without_mark(lines), key=lambda line: line.isspace()):
            if not blank:
                number += 1
                yield _paragraph(number, group, limit)


def _without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that hold something, without the byte-order mark that a file may begin with."""
    for number, line in enumerate(lines):
        if number == 0 and not isinstance(line, TooLong):
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line or isinstance(line, TooLong):
            yield line


def _paragraph(number: int, lines: Iterable[bytes], limit: int) -> tuple[str, str | Unusable]:
    """One document of a text file; of one that is too long, no more is kept than is allowed."""
    name, size = f"document {number}", 0
    parts: list[bytes] = []
    for line in lines:
        size += line.size if isinstance(line, TooLong) else len(line)
        if size <= limit:
            parts.append(line)
        else:
            parts.clear()
    if size > limit:
        return name, Unusable(f"is longer than --max_document_mb allows ({size / MEGABYTE:.3g} MB)")
    data = b"".join(parts).rstrip(b"\r\n")
    try:
        return name, data.decode()
    except UnicodeDecodeError as error:
        return name, Unusable(str(error), is_sentence=True)


def _json_rows(path: Path, text_field: str, limit: int) -> Rows:
    for number, (name, row) in enumerate(json_rows(path, limit, text_field), start=1):
        if isinstance(row, Unusable):
            yield name, row
        elif text_field not in row:
            yield name, Unusable(str(_missing_field(text_field, row)), is_sentence=True)
        else:
            yield _text_or_not(number, row[text_field])


def _parquet_rows(path: Path, text_field: str, limit: int) -> Rows:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            raise _missing_field(text_field, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=[text_field]):
            for value in batch.column(0):
                number += 1
                try:
                    yield _text_or_not(number, value.as_py())
                except UnicodeDecodeError as error:
                    yield f"document {number}", Unusable(str(error), is_sentence=True)
