"""Rows of local files, as they are written: text stays text, and every row that cannot be read is refused by number.

CSV is that of RFC 4180, with quotes; TSV is that of GLUE, where a quotation mark is a character like any other; JSON is
one object per line, or one array of objects. All are UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from peft_pretraining.data.json_rows import encodable
from peft_pretraining.flags import ConfigError

log = logging.getLogger("peft_pretraining")

_SHOWN = 5
_LONGEST_SHOWN = 60
_LONGEST_FIELD = 2**31 - 1  # characters; the reader's own limit is 131,072

Row = dict[str, Any]


@dataclass
class Problems:
    """What is wrong with the rows of one file, by reason; each reason becomes one line with the rows' numbers."""

    origin: str
    names_all: bool = True
    """Name the first rows of each reason, or only the first one and how many more there are."""
    by_reason: dict[str, list[int]] = field(default_factory=dict)
    unreadable: dict[str, list[int]] = field(default_factory=dict)
    """Numbers of lines that are no rows at all, by reason."""

    def add(self, number: int, reason: str) -> None:
        """Note what is wrong with a row; rows are counted from 1, without a header."""
        self.by_reason.setdefault(reason, []).append(number)

    def lines(self) -> list[str]:
        named = name_rows if self.names_all else _name_first
        told = [f"cannot be read ({name_rows(lines, 'line')} {why})" for why, lines in self.unreadable.items()]
        told += [f"{named(rows)}: {why}" for why, rows in self.by_reason.items()]
        if len(told) > _SHOWN:
            told[_SHOWN:] = [f"{len(told) - _SHOWN} further problems of the same kinds"]
        return [f"{self.origin}: {line}" for line in told]


def name_rows(numbers: Sequence[int], kind: str = "row") -> str:
    """`row 3`, `rows 3, 5, 8`, `rows 3, 5, 8, 9, 12 and 40 more`."""
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"{kind}{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _name_first(numbers: Sequence[int]) -> str:
    return f"row {numbers[0]}" + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")


def show(value: Any) -> str:
    """A value in a message, cut off where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of numbers with thousands of digits, and of deep nesting
        text = type(value).__name__
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, in their order: columns and values, which are text in CSV and TSV.

    Raises `ConfigError`, a line per kind of problem, for a file that cannot be read or has no rows, and for rows that
    cannot be taken as they are.
    """
    path = Path(path)
    problems = Problems(str(path))
    try:
        with _open(path) as file:
            table = _suffix(path) in (".csv", ".tsv")
            rows = list(_table_rows(file, _suffix(path), problems) if table else _json_rows(file, problems))
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: {_encoding_problem(error)}"]) from None
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, ImportError) as error:
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
        raise ConfigError([f"{path}: cannot be read ({why})"]) from None
    if problems.by_reason or problems.unreadable:
        raise ConfigError(problems.lines())
    if not rows:
        raise ConfigError([f"{path}: holds no rows"])
    return rows


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() in (".gz", ".zst") else path.name).suffix.lower()


def _open(path: Path) -> TextIO:
    """The file as text with its line ends as they are."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    if path.suffix.lower() == ".zst":
        import io

        import zstandard

        stream = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(open(path, "rb"), True)
        return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _encoding_problem(error: UnicodeDecodeError) -> str:
    start = bytes(error.object[:2])
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return "it is UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8)"
    return f"it is not UTF-8 (byte 0x{error.object[error.start]:02x}): convert it (iconv -f LATIN1 -t UTF-8)"


def _table_rows(file: TextIO, suffix: str, problems: Problems) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    if suffix == ".csv":
        reader = csv.reader(file, strict=True)
    else:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    records = _records(reader, problems)
    header = next(records, None)
    if header is None:
        return
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        raise ConfigError([f"{problems.origin}: the header has {', '.join(map(repr, doubled))} more than once"])
    number = 0
    for number, record in enumerate(records, start=1):
        if len(record) == len(header):
            yield dict(zip(header, map(encodable, record), strict=True))
        else:
            few = "fewer" if len(record) < len(header) else "more"
            problems.add(number, f"{few} fields than the {len(header)} of the header ({', '.join(header)[:200]})")


def _records(reader: Any, problems: Problems) -> Iterator[list[str]]:
    """The records, but for empty lines, which are counted in the log."""
    blank, number = 0, -1  # the header is no row
    try:
        for record in reader:
            if record:
                number += 1
                yield record
            else:
                blank += 1
    except csv.Error as error:
        raise ConfigError(
            [f"{problems.origin}: row {number + 1} (line {reader.line_num}): not valid as it is quoted ({error})"]
        ) from None
    if blank:
        log.warning("%s: %d empty line%s passed over", problems.origin, blank, " is" if blank == 1 else "s are")


def _json_rows(file: TextIO, problems: Problems) -> Iterator[Row]:
    for number, row in _objects(file, problems):
        if isinstance(row, dict):
            yield {encodable(key): encodable(value) if isinstance(value, str) else value for key, value in row.items()}
        else:
            problems.add(number, "it is not a JSON object")


def _objects(file: TextIO, problems: Problems) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not blank, or of each item of an array."""
    lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        content = _parsed(first[1] + file.read())
        if isinstance(content, _Unreadable):
            raise ConfigError([f"{problems.origin}: cannot be read (it is {content.why})"])
        yield from enumerate(content, start=1)
        return
    row = 0
    for number, line in itertools.chain([first], lines):
        value = _parsed(line)
        if isinstance(value, _Unreadable):
            problems.unreadable.setdefault(f"is {value.why}", []).append(number)
        else:
            row += 1
            yield row, value


@dataclass(frozen=True)
class _Unreadable:
    why: str


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        return _Unreadable("nested too deeply")
    except json.JSONDecodeError as error:
        return _Unreadable(f"not valid JSON ({error.msg})")
    except ValueError as error:  # a key twice, or a number of thousands of digits
        return _Unreadable(f"not valid JSON ({str(error).split(';')[0][:200]})")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {show(next(name for name in names if names.count(name) > 1))} stands twice")
    return row
