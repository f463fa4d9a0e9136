"""Converters: from the text that was given for a setting to its value; ValueError says what the value must be.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

LARGEST_INTEGER = 2**63 - 1
_LONGEST_NAME, _LONGEST_PATH = 255, 3800  # bytes that file systems and the kernel allow, with room for our own names


def text(value: str) -> str:
    """Any text that can be written to a file again."""
    if not value:
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not contain NUL bytes")
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text come as single surrogates
        raise ValueError("must be UTF-8") from None
    return value


def string(value: str) -> str:
    """A name or a path, of a length that file systems allow."""
    parts = text(value).encode().split(b"/")
    if (longest := max(map(len, parts))) > _LONGEST_NAME:
        raise ValueError(f"has a name of {longest} bytes, and file systems allow {_LONGEST_NAME}")
    if (length := len(os.path.abspath(value).encode())) > _LONGEST_PATH:
        raise ValueError(f"is a path of {length} bytes, and at most {_LONGEST_PATH} can be used")
    return value


def boolean(text: str) -> bool:
    """`--flag`, `--flag True|true`, `--flag False|false`."""
    if text in ("", "True", "true"):
        return True
    if text in ("False", "false"):
        return False
    raise ValueError("must be True or False (or nothing, for True)")


boolean.__dict__["value_is_optional"] = True


def choice(*allowed: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    convert.__dict__["allowed"] = allowed
    return convert


def _number(kind: type, text: str) -> Any:
    try:
        if not re.fullmatch(r"[!-~]+", text):  # Python takes the digits of every script, and spaces around them
            raise ValueError
        value = kind(text)
    except ValueError:
        raise ValueError(f"must be {'an integer' if kind is int else 'a number'}") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be finite")
    if kind is int and abs(value) > LARGEST_INTEGER:
        bound = f"most {LARGEST_INTEGER}" if value > 0 else f"least -{LARGEST_INTEGER}"
        raise ValueError(f"must be at {bound}")
    return value


def integer(text: str) -> int:
    return _number(int, text)


def positive_int(text: str) -> int:
    if (value := _number(int, text)) <= 0:
        raise ValueError("must be a positive integer")
    return value


def sequence_length(text: str) -> int:
    """In tokens; a single one would have nothing to predict."""
    if (value := _number(int, text)) < 2:
        raise ValueError("must be an integer of at least 2 (a sequence of one token has nothing to predict)")
    return value


def non_negative_int(text: str) -> int:
    if (value := _number(int, text)) < 0:
        raise ValueError("must be an integer of at least 0")
    return value


def number(text: str) -> float:
    return _number(float, text)


def positive_float(text: str) -> float:
    if (value := _number(float, text)) <= 0:
        raise ValueError("must be greater than 0")
    return value


def non_negative_float(text: str) -> float:
    if (value := _number(float, text)) < 0:
        raise ValueError("must be at least 0")
    return value


def fraction_below_one(text: str) -> float:
    if not 0 <= (value := _number(float, text)) < 1:
        raise ValueError("must be at least 0 and below 1")
    return value


def fraction_up_to_one(text: str) -> float:
    if not 0 <= (value := _number(float, text)) <= 1:
        raise ValueError("must be between 0 and 1")
    return value


def token_count(text: str) -> int:
    """A number of tokens: `1000000`, `100M`, `1.5B`."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    digits = text if scale == 1 else text[:-1]
    try:
        value = round(_number(float, digits) * scale)
    except (ValueError, OverflowError):
        raise ValueError("must be a number of tokens such as 100M or 2B") from None
    if value <= 0:
        raise ValueError("must be a positive number of tokens")
    if value > LARGEST_INTEGER:
        raise ValueError(f"must be at most {LARGEST_INTEGER} tokens")
    return value


def comma_separated(value: str) -> tuple[str, ...]:
    """Items between commas; empty ones are left out."""
    return tuple(item for item in (part.strip() for part in (text(value) if value else "").split(",")) if item)
