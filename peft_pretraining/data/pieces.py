"""The documents of a source, piece by piece, as text.

A split is a list of pieces (its files), which are read one by one, and only the documents that are being read are in
memory. Text and JSON files are read here rather than by `datasets`, which types every column of a file (and stops where
an unused one changes its type) and splits text at exactly one empty line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from peft_pretraining.data.json_rows import Unusable, encodable, json_rows, one_line
from peft_pretraining.data.lines import (
    BYTE_ORDER_MARK,
    LONGEST_DOCUMENT,
    MEGABYTE,
    LineReader,
    TooLong,
    open_binary,
)
from peft_pretraining.data.sources import Source, file_format
from peft_pretraining.data.tally import Tally
from peft_pretraining.flags import ConfigError

ROWS_PER_READ = 1000
ROWS_PER_PIECE = 1000  # of a folder saved by `datasets`, which is read at any row

Documents = Callable[[Tally], Iterator[str]]
"""Starts reading a piece of a split from its first document; rows that hold none are counted."""
Rows = Iterator[tuple[str, "str | Unusable"]]
"""Name of each row, such as `line 3`, and its text."""


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
    reader = _json_rows if force_json else readers.get(file_format(file), _json_rows)
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
