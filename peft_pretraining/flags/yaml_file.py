"""The one reader of YAML files: plain data, from a file that may come from anybody.

YAML's usual loaders take what no settings need: Python objects, aliases whose expansion outgrows the memory, a key
twice, of which the last wins unsaid. Here all of that ends in a `YamlProblem` of one line. Nothing here imports torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LARGEST_FILE = 256 * 1024
"""Bytes. Settings have a few thousand."""
_MOST_VALUES = 20_000
"""With aliases written out."""
_DEEPEST = 20

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN_TAGS = {
    None,
    "!",
    *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")),
}


class YamlProblem(ValueError):
    """What is wrong with a file, in one line without its name."""


def load(path: str | Path, as_text: bool = False) -> Any:
    """The content of a YAML file: dicts, lists, strings, numbers, booleans, None and dates.

    as_text: numbers and dates stay the text that stands in the file, for the flags' own converters; booleans are
        `Switch`.

    Raises `OSError` when the file cannot be read, `YamlProblem` when it is not used.
    """
    text = _read(path)
    try:
        _check_events(yaml.parse(text, Loader=_SafeLoader))
        return yaml.load(text, Loader=_TextLoader if as_text else _SafeLoader)
    except YamlProblem:
        raise
    except RecursionError:
        raise YamlProblem("it is nested too deeply") from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        TypeError,
        AttributeError,
    ) as error:  # the latter three of values
        raise YamlProblem(" ".join(str(error).split())) from None


def load_mapping(path: str | Path) -> dict[str, Any]:
    """The content of a file that must be a mapping. Raises `YamlProblem` when it cannot be read, too."""
    try:
        content = load(path)
    except OSError as error:
        raise YamlProblem(f"cannot be read ({error.strerror})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise YamlProblem("must be a mapping of names to values")
    return content


def _read(path: str | Path) -> str:
    # Opening a pipe without a writer would wait for one.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(21, os.strerror(21), str(path))
        if not stat.S_ISREG(kind):
            raise YamlProblem("it is not a regular file")
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise YamlProblem(f"it is larger than {LARGEST_FILE // 1024} KiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlProblem(f"it is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from None


@dataclass
class _Collection:
    """A mapping or list that is not closed yet."""

    anchor: str | None
    size: int = 1
    """Values in it so far, itself among them, with aliases written out."""
    keys: dict[str, int] | None = None
    """Of a mapping: the line of each key."""
    at_key: bool = False
    """Of a mapping: what comes next is a key."""


def _check_events(events: Iterator[yaml.Event]) -> None:
    """Everything that can be said before anything is built: size and depth, tags, keys, the number of documents."""
    sizes: dict[str, int] = {}
    """Values under each anchor."""
    still_open: list[_Collection] = []
    documents = 0
    for event in events:
        assert event.start_mark is not None, "events that were parsed say where"
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise YamlProblem("it holds several documents, and one is read")
        elif isinstance(event, yaml.NodeEvent):
            if (tag := getattr(event, "tag", None)) not in _PLAIN_TAGS:
                raise YamlProblem(f"line {line}: the tag {tag} is not allowed, only plain values are")
            if still_open and still_open[-1].keys is not None:
                _check_key(still_open[-1], still_open[-1].keys, event, line)
            if isinstance(event, yaml.CollectionStartEvent):
                is_mapping = isinstance(event, yaml.MappingStartEvent)
                still_open.append(_Collection(event.anchor, keys={} if is_mapping else None, at_key=is_mapping))
                if len(still_open) > _DEEPEST:
                    raise YamlProblem(f"line {line}: it is nested more than {_DEEPEST} deep")
            else:
                _add(_size_of(event, sizes, line), still_open)
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = still_open.pop()
            if closed.anchor is not None:
                sizes[closed.anchor] = closed.size
            _add(closed.size, still_open)


def _check_key(mapping: _Collection, keys: dict[str, int], event: yaml.Event, line: int) -> None:
    mapping.at_key = not mapping.at_key
    if mapping.at_key:  # this was a value
        return
    if not isinstance(event, yaml.ScalarEvent):
        raise YamlProblem(f"line {line}: a key must be a single value")
    if event.value == "<<" and event.implicit[0]:  # what is merged in may be replaced: that is what it is for
        return
    if event.value in keys:
        raise YamlProblem(f"key {event.value!r} is given twice, in lines {keys[event.value]} and {line}")
    keys[event.value] = line


def _size_of(event: yaml.NodeEvent, sizes: dict[str, int], line: int) -> int:
    if isinstance(event, yaml.ScalarEvent):
        if event.anchor is not None:
            sizes[event.anchor] = 1
        return 1
    if event.anchor not in sizes:
        raise YamlProblem(f"line {line}: the alias *{event.anchor} names nothing that is complete before it")
    return sizes[event.anchor]


def _add(size: int, still_open: list[_Collection]) -> None:
    if still_open:
        still_open[-1].size += size
        if still_open[-1].size > _MOST_VALUES:
            raise YamlProblem(f"it holds more than {_MOST_VALUES:,} values, with its aliases written out")


class Switch(str):
    """A boolean as it was written: `no` may also be a name."""

    @property
    def on(self) -> bool:
        return yaml.constructor.SafeConstructor.bool_values[self.lower()]


class _TextLoader(_SafeLoader):
    """Numbers and dates as they were written: `010` is ten to a flag, and eight to YAML."""


for _kind in ("int", "float", "timestamp"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _SafeLoader.construct_scalar)
_TextLoader.add_constructor("tag:yaml.org,2002:bool", lambda loader, node: Switch(loader.construct_scalar(node)))
