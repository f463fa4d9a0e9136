"""Command-line flags and YAML settings, parsed so that every problem is found in one pass.

argparse stops at the first bad value; a user of a cluster queue wants all of them at once. So argparse only splits the
command line here, and values go through the converters below, which add to a list of problems instead of exiting.
Nothing in this module imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_BAD_INPUT = 2

_NO_VALUE = object()

_NEGATIVE_NUMBER = re.compile(r"-\.?[0-9].*")


class ConfigError(ValueError):
    """Everything that is wrong with what the user gave, one line per problem."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__(self.problems)  # what pickling calls the class with, between processes

    def __str__(self) -> str:
        return "\n".join(self.problems)


@dataclass(frozen=True)
class Flag:
    """One setting: `--name` on the command line, `name:` in a YAML file."""

    name: str
    convert: Callable[[str], Any]
    help: str
    aliases: tuple[str, ...] = ()

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def setting(default: Any, convert: Callable[[str], Any], help: str, aliases: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a flag."""
    return dataclasses.field(default=default, metadata={"convert": convert, "help": help, "aliases": aliases})


@dataclass(frozen=True)
class Given:
    """A setting that the user gave: its converted value and the spelling that was used."""

    value: Any
    spelling: str
    source: str  # "command line" or the YAML file's path


class _Record(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        namespace._given[self.dest] = (option_string.lstrip("-"), values)


def parse_command_line(
    flags: Sequence[Flag], argv: Sequence[str], *, prog: str, description: str, problems: list[str]
) -> dict[str, Given]:
    """Split and convert `argv`; problems are appended to `problems`. `--help` prints and exits, as usual."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(
            *(f"--{spelling}" for spelling in flag.spellings),
            dest=flag.name,
            action=_Record,
            nargs="?",
            const=_NO_VALUE,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=flag.help.replace("%", "%%"),
        )
    namespace, extra = parser.parse_known_args(_join_negative_numbers(argv), argparse.Namespace(_given={}))
    by_name = {flag.name: flag for flag in flags}
    _report_unknown(extra, flags, problems)
    given = {}
    for name, (spelling, raw) in namespace._given.items():
        _convert(by_name[name], spelling, raw, "command line", given, problems)
    return given


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--lr -4e-4` as `--lr=-4e-4`: argparse takes a negative number with an exponent or a suffix for a flag."""
    joined: list[str] = []
    for token in argv:
        if joined and re.fullmatch(r"--[^=]+", joined[-1]) and _NEGATIVE_NUMBER.fullmatch(token):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def parse_yaml(flags: Sequence[Flag], path: str, problems: list[str]) -> dict[str, Given]:
    """Settings of a YAML file, each through its flag's own converter (YAML reads `4e-4` as a string)."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        problems.append(f"--training_config {path}: cannot be read ({error.strerror})")
        return {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"--training_config {path}: not valid YAML ({' '.join(str(error).split())})")
        return {}
    if not isinstance(settings, dict):
        problems.append(f"--training_config {path}: must be a mapping of flag names to values")
        return {}
    # One file cannot name another: it would never be read.
    by_spelling = {spelling: flag for flag in flags if flag.name != "training_config" for spelling in flag.spellings}
    given: dict[str, Given] = {}
    for key, value in settings.items():
        if str(key) not in by_spelling:
            problems.append(f"--training_config {path}: unknown key {key!r}{_suggestion(str(key), by_spelling)}")
        elif isinstance(value, dict):
            problems.append(f"--training_config {path}: {key} must be a single value, got a mapping")
        elif value is not None:  # `key:` or `key: null` leaves the default
            raw = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            _convert(by_spelling[str(key)], str(key), raw, path, given, problems)
    return given


def _convert(flag: Flag, spelling: str, raw: Any, source: str, given: dict[str, Given], problems: list[str]) -> None:
    if raw is _NO_VALUE:
        if not getattr(flag.convert, "value_is_optional", False):
            problems.append(f"--{spelling} needs a value")
            return
        raw = ""
    try:
        given[flag.name] = Given(flag.convert(raw), spelling, source)
    except ValueError as error:
        where = "" if source == "command line" else f" (in {source})"
        problems.append(f"--{spelling} {error}, got {raw!r}{where}")


def _report_unknown(extra: Sequence[str], flags: Sequence[Flag], problems: list[str]) -> None:
    spellings = [spelling for flag in flags for spelling in flag.spellings]
    after_unknown_flag = False
    for token in extra:
        if token.startswith("--"):
            name = token[2:].split("=")[0]
            problems.append(f"unknown flag --{name}{_suggestion(name, spellings)}")
            after_unknown_flag = "=" not in token
        elif not after_unknown_flag:  # otherwise it is the unknown flag's value
            problems.append(f"unexpected argument {token!r}")


def _suggestion(name: str, spellings: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(spellings), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def exit_with_problems(error: ConfigError) -> int:
    """Print one line per problem on stderr and return the exit code for bad input."""
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_BAD_INPUT


# Converters: from the text that was given to a value; ValueError says what the value must be.


def string(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


def boolean(text: str) -> bool:
    """`--flag`, `--flag True|true`, `--flag False|false`."""
    if text in ("", "True", "true"):
        return True
    if text in ("False", "false"):
        return False
    raise ValueError("must be True or False (or nothing, for True)")


boolean.value_is_optional = True


def choice(*allowed: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return convert


def _number(kind: type, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"must be {'an integer' if kind is int else 'a number'}") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be finite")
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
        value = round(float(digits) * scale)
    except (ValueError, OverflowError):
        raise ValueError("must be a number of tokens such as 100M or 2B") from None
    if value <= 0:
        raise ValueError("must be a positive number of tokens")
    return value


def comma_separated(text: str) -> tuple[str, ...]:
    return tuple(item for item in (part.strip() for part in text.split(",")) if item)
