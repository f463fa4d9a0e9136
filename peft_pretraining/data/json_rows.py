"""Rows of JSON: one object a line, or one array of objects. Every reader of JSON data is one of these.

A row that cannot be used is an `Unusable` that says why, in words that follow the row's name: "is not valid JSON". Who
reads decides whether that is refused or passed over and counted.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from peft_pretraining.data.lines import (
    BYTE_ORDER_MARK,
    LONGEST_DOCUMENT,
    MEGABYTE,
    LineReader,
    TooLong,
    is_blank,
    open_binary,
)

_CHUNK = 2**20
_SPACE = " \t\n\r"


@dataclass(frozen=True)
class Unusable:
    """A row that is passed over or refused."""

    reason: str
    """What it is or lacks, as the rest of a sentence that begins with the row's name."""
    is_sentence: bool = False
    """Whether the reason is a sentence of its own, which the name may follow."""

    def __str__(self) -> str:
        return self.reason

    def of(self, name: str) -> str:
        """The whole sentence about the row of this name."""
        return f"{self.reason} ({name})" if self.is_sentence else f"{name} {self.reason}"


def one_line(error: BaseException) -> str:
    """The first line of an exception's message with what it announces, or its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = lines[0] if not lines[0].endswith(":") else " ".join(lines)
    return said if len(said) <= 500 else said[:500] + "..."


def parse_object(line: bytes, field: str | None = None) -> dict[str, Any] | Unusable:
    """The object on one line, with or without a byte-order mark; `field`: a name that must not be there twice."""
    if isinstance(line, TooLong):
        return Unusable(f"is longer than --max_document_mb allows ({line.size / MEGABYTE:.3g} MB)")
    outermost: list[tuple[str, Any]] = []
    repeated = field is not None and line.count(b'"%s"' % field.encode("utf-8", "replace")) > 1

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = pairs  # the last object that is complete is the one around all others
        return dict(pairs)

    try:
        text = line.removeprefix(BYTE_ORDER_MARK).decode()
        row = json.loads(text, object_pairs_hook=made if repeated else None)
    except RecursionError:
        return Unusable("is nested too deeply to be read")
    except UnicodeDecodeError as error:
        return Unusable(f"is not valid JSON (byte {error.start + 1} is no UTF-8)")
    except ValueError as error:
        return Unusable(f"is not valid JSON ({getattr(error, 'msg', None) or one_line(error)})")
    if not isinstance(row, dict):
        return Unusable("is not a JSON object")
    if repeated and sum(name == field for name, _ in outermost) > 1:
        return Unusable(f"has the field {field!r} twice")
    return row


def encodable(text: str) -> str:
    """JSON may hold half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def json_rows(
    path: Path, limit: int = LONGEST_DOCUMENT * MEGABYTE, field: str | None = None
) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """(name, object) of every JSON line, or of every item of one JSON array, in bounded memory.

    Names are `line 3` (from 1, blank lines counted) and, in an array, `row 3`. `limit` is in bytes of one row. Raises
    `ValueError` where an array ends to be one, and whatever reading and decompressing raise.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
    >>> _ = path.write_text('{"text": "one"}\\n\\n{"text": "three"}\\n')
    >>> list(json_rows(path))
    [('line 1', {'text': 'one'}), ('line 3', {'text': 'three'})]
    """
    with open_binary(path) as file:
        if file.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            yield from _array_rows(file, limit)
            return
        for number, line in enumerate(LineReader(file, limit), start=1):
            if not is_blank(line):
                yield f"line {number}", parse_object(line, field)


def json_objects(path: Path, limit: int = LONGEST_DOCUMENT * MEGABYTE) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every JSON line, or item of one JSON array. `ValueError` names the first that is no object.

    Numbers are those of the lines, from 1.
    """
    for name, row in json_rows(path, limit):
        if isinstance(row, Unusable):
            raise ValueError(f"{name} {row.reason}")
        yield int(name.rpartition(" ")[2]), row


class _Characters:
    """What is left of an array's text, from a place that only goes forwards."""

    def __init__(self, file: BinaryIO):
        self._decode, self._file = codecs.getincrementaldecoder("utf-8-sig")().decode, file
        self.text, self.place, self.complete = "", 0, False

    def more(self) -> None:
        """Read about as much again as there is."""
        kept = self.text[self.place :]
        data = self._file.read(max(_CHUNK, len(kept)))
        self.complete = not data
        self.text, self.place = kept + self._decode(data, self.complete), 0

    def peek(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self.text) or self.complete:
                return self.text[self.place : self.place + 1]
            self.more()


def _array_rows(file: BinaryIO, limit: int) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """The items of an array, parsed one by one; what is no object is `Unusable`, what is no JSON a `ValueError`."""
    characters, number = _Characters(file), 1
    try:
        characters.peek()
        characters.place += 1  # the bracket
        if characters.peek() == "]":
            characters.place += 1
        else:
            while True:
                row = _item(characters, number, limit)
                yield f"row {number}", row if isinstance(row, dict) else Unusable("is not a JSON object")
                separator = characters.peek()
                characters.place += 1
                if separator == "]":
                    break
                if separator != ",":
                    raise ValueError(f"row {number} is followed by {separator!r}, not by a comma or a closing bracket")
                number += 1
        if characters.peek():
            raise ValueError(f"something follows the array's end, after row {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"row {number} is no UTF-8 ({error.reason})") from error


def _item(characters: _Characters, number: int, limit: int) -> Any:
    decoder = json.JSONDecoder()
    characters.peek()
    while True:
        try:
            value, end = decoder.raw_decode(characters.text, characters.place)
            if end < len(characters.text) or characters.complete:  # a number might go on
                characters.place = end
                return value
        except RecursionError:
            raise ValueError(f"row {number} is nested too deeply to be read") from None
        except ValueError as error:
            if characters.complete:
                raise ValueError(f"row {number} is not valid JSON ({getattr(error, 'msg', error)})") from error
        if len(characters.text) - characters.place > limit:
            raise ValueError(f"row {number} is no JSON, or longer than --max_document_mb allows")
        characters.more()
