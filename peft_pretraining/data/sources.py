"""Where documents come from: local text, JSON and Parquet files, folders saved by `datasets`, the hub.

`find_source` looks at names only; `open_pieces` gives each split as a list of pieces (its files), which are read one by
one, and only the documents that are being read are in memory. Text and JSON files are read here rather than by
`datasets`, which types every column of a file (and stops where an unused one changes its type) and splits text at
exactly one empty line. Nothing heavy is imported before a source is opened.
"""

from __future__ import annotations

import glob
import gzip
import importlib.util
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peft_pretraining.flags import ConfigError

HUB_ALIASES = {"c4": "allenai/c4"}  # the plain name needs a loading script, which `datasets` no longer runs
SUPPORTED = (".txt", ".json", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
ROWS_PER_READ = 1000
ROWS_PER_PIECE = 1000  # of a folder saved by `datasets`, which is read at any row

Documents = Callable[[], Iterator[str]]
"""Starts reading a piece of a split from its first document."""


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
    if not from_json and any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return Source("saved", path.resolve().name, dataset)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file() and (from_json or _format(file) in SUPPORTED))
        missing = f"holds neither a dataset saved by `datasets` nor files of a known kind ({', '.join(SUPPORTED)})"
    elif glob.has_magic(dataset) and not path.is_file():
        found = sorted(Path(name) for name in glob.glob(dataset, recursive=True) if os.path.isfile(name))
        missing = "no file matches this wildcard"
    else:
        found = [path] if path.is_file() else []
        missing = "file or folder not found"
        if not found and not from_json and _can_be_hub_name(dataset):
            hub_name = HUB_ALIASES.get(dataset, dataset)
            return Source("hub", hub_name, hub_name)
    if not found:
        problems.append(f"--dataset {dataset}: {missing}")
        return None
    problems += _unreadable(found, from_json)
    return Source("files", _base_name(dataset), dataset, _splits_by_name(found, warnings), from_json)


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


def open_pieces(source: Source, dataset_config: str | None, text_field: str) -> dict[str, list[Documents]]:
    """The pieces of the `train` split and, where the source has it, of the `validation` split, in their order.

    A piece is a file, or so many rows of a folder saved by `datasets`. ConfigError, then or while documents are read,
    for whatever keeps the data from being read: one line each.
    """
    if source.kind == "files":
        return {
            split: [partial(_documents_of_file, file, text_field, source.force_json) for file in files]
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
    return {split: pieces(f"--dataset {source.origin}", splits[name], text_field) for split, name in chosen.items()}


def _pieces_of_rows(origin: str, dataset: Any, text_field: str) -> list[Documents]:
    def rows(first: int) -> Iterator[Any]:
        return _rows_of_dataset(dataset.select(range(first, min(first + ROWS_PER_PIECE, len(dataset)))), text_field)

    firsts = range(0, len(dataset), ROWS_PER_PIECE)
    return [partial(_text_only, origin, partial(rows, first), first) for first in firsts]


def _pieces_of_stream(origin: str, dataset: Any, text_field: str) -> list[Documents]:
    count = dataset.num_shards
    parts = [dataset.shard(count, index) for index in range(count)] if count > 1 else [dataset]
    return [partial(_text_only, origin, partial(_rows_of_dataset, part, text_field)) for part in parts]


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _text_only(origin: str, rows: Callable[[], Iterator[Any]], first: int = 0) -> Iterator[str]:
    """The rows, which must be text; whatever fails while reading them becomes one line that says where."""
    try:
        for number, text in enumerate(rows(), start=first + 1):
            if not isinstance(text, str):
                raise TypeError(f"document {number} is not text but {type(text).__name__}")
            yield encodable(text)
    except Exception as error:  # files, decompressors, pyarrow and the hub raise exceptions of their own
        raise ConfigError([f"{origin}: {one_line(error)}"]) from error


def encodable(text: str) -> str:
    """JSON may hold half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _missing_field(text_field: str, columns: Iterable[str]) -> ValueError:
    return ValueError(f"no --text_field {text_field!r} among the columns {', '.join(map(repr, columns))}")


def _rows_of_dataset(dataset: Any, text_field: str) -> Iterator[Any]:
    if text_field in (dataset.column_names or ()):  # a stream may not know its columns before it is read
        dataset = dataset.select_columns([text_field])
    for batch in dataset.iter(batch_size=ROWS_PER_READ):
        if text_field not in batch:
            raise _missing_field(text_field, batch)
        yield from batch[text_field]


def _documents_of_file(file: Path, text_field: str, force_json: bool) -> Iterator[str]:
    readers = {".txt": _text_rows, ".parquet": _parquet_rows}
    reader = _json_rows if force_json else readers.get(_format(file), _json_rows)
    return _text_only(str(file), partial(reader, file, text_field))


def _open_text(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        import zstandard

        # Files of several frames are common, and so are long windows (zstd --long).
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        stream = decompressor.stream_reader(open(path, "rb"), read_across_frames=True)
        return io.TextIOWrapper(stream, encoding="utf-8")
    return open(path, encoding="utf-8")


def _text_rows(path: Path, text_field: str) -> Iterator[str]:
    """Documents are separated by blank lines; the lines of one document stay as they are."""
    with _open_text(path) as file:
        for blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
            if not blank:
                yield "".join(lines).rstrip("\n")


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every JSON line, or of one JSON array (which has to fit into memory).

    Numbers are those of the lines, from 1. `ValueError` says which one is not a JSON object.
    """
    with _open_text(path) as file:
        lines = enumerate(file, start=1)
        first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
        if first[1].lstrip().startswith("["):
            rows = enumerate(json.loads(first[1] + file.read()), start=1)
        else:
            rows = _json_lines(itertools.chain([first], lines))
        for number, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is not a JSON object")
            yield number, row


def _json_rows(path: Path, text_field: str) -> Iterator[Any]:
    for _, row in json_objects(path):
        if text_field not in row:
            raise _missing_field(text_field, row)
        yield row[text_field]


def _json_lines(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not valid JSON ({error.msg})") from error
            yield number, row


def _parquet_rows(path: Path, text_field: str) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            raise _missing_field(text_field, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=[text_field]):
            yield from batch.column(0).to_pylist()
