"""Command-line flags and YAML settings, parsed so that every problem is found in one pass.

argparse stops at the first bad value; a user of a cluster queue wants all of them at once. So argparse only splits the
command line here, and values go through the converters, which add to a list of problems instead of exiting.
Nothing in this module imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_pretraining.flags import completion
from peft_pretraining.flags.converters import string, text

EXIT_BAD_INPUT = 2

_NO_VALUE = object()
_LONGEST_SHOWN, _LONGEST_LINE = 200, 2000  # characters of a value in a message, and of a message

_NEGATIVE_NUMBER = re.compile(r"-\.?[0-9].*", re.DOTALL)


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
    foreign: tuple[str, ...] = ()
    """Other programs' names of the same setting: accepted, but not proposed."""
    refused: bool = False
    """It is known only to be refused with its reason."""
    default: Any = None
    """What it is where nothing says otherwise."""
    group: str = ""
    """Its heading in `--help`."""

    values: tuple[str, ...] = ()
    """What it may be, where the converter alone does not say so: for completion."""

    @property
    def known_values(self) -> tuple[str, ...]:
        """Values to propose; none where it may be anything."""
        if getattr(self.convert, "value_is_optional", False):
            return ("True", "False")
        return self.values or tuple(getattr(self.convert, "allowed", ()))

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def accepted(self) -> tuple[str, ...]:
        return (*self.spellings, *self.foreign)


def setting(
    default: Any, convert: Callable[[str], Any], help: str, aliases: tuple[str, ...] = (), *, identity: bool = False
) -> Any:
    """A dataclass field that is also a flag.

    identity: checkpoints compute something else without it, so a run that goes on must share it.
    """
    metadata = {"convert": convert, "help": help, "aliases": aliases, "identity": identity}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ParsedFlag:
    """A setting that the user gave: its converted value and the spelling that was used."""

    value: Any
    spelling: str
    source: str  # "command line" or the YAML file's path
    replaced: str | None = None
    """The flag before this one that says something else of the same setting under another name."""


class _Record(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        namespace._given.setdefault(self.dest, []).append((option_string.lstrip("-"), values))


def parse_command_line(
    flags: Sequence[Flag],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    problems: list[str],
    hints: Mapping[str, str] | None = None,
) -> dict[str, ParsedFlag]:
    """Split and convert `argv`; problems are appended to `problems`. `--help` prints and exits, as usual.

    The last occurrence of a flag wins, as argparse has it, so that a script's flags can be overridden.
    hints: what to say of flags that do not exist, by name.
    """
    parser = build_parser(flags, prog, description)
    completion.offer(parser, {flag.name: flag.known_values for flag in flags})
    namespace, extra = parser.parse_known_args(_join_negative_numbers(argv), argparse.Namespace(_given={}))
    by_name = {flag.name: flag for flag in flags}
    _report_unknown(extra, flags, problems, hints or {})
    given: dict[str, ParsedFlag] = {}
    for name, occurrences in namespace._given.items():
        spelling, raw = occurrences[-1]
        _convert(by_name[name], spelling, raw, "command line", given, problems)
        other = [item for item in occurrences if item[0] != spelling and item[1] != raw]
        if name in given and other:
            given[name] = dataclasses.replace(given[name], replaced=f"--{other[-1][0]} {_shown_raw(other[-1][1])}")
    return given


def build_parser(flags: Sequence[Flag], prog: str, description: str) -> argparse.ArgumentParser:
    """The parser whose `--help` shows flags in their groups, in the order in which the groups first appear.

    `prog` is the script's name; of an installed command it is the command's own.
    """
    called = os.path.basename(sys.argv[0])
    prog = called if called.startswith("peft-") else prog
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--FLAG VALUE] ...",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(flag.group for flag in flags) if title}
    for flag in flags:
        groups.get(flag.group, parser).add_argument(
            *(f"--{spelling}" for spelling in flag.accepted),
            dest=flag.name,
            action=_Record,
            nargs="?",
            const=_NO_VALUE,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{flag.help}{_default_note(flag)}".replace("%", "%%"),
        )
    return parser


def _default_note(flag: Flag) -> str:
    """` (default: 128)`, unless the help says it already or there is none."""
    if "default" in flag.help or flag.default in (None, ()):
        return ""
    return f" (default: {shown_default(flag.default)})"


def shown_default(value: Any) -> str:
    """A default as one would write it on a command line."""
    items = value if isinstance(value, tuple) else (value,)
    return ",".join(
        f"{item:g}" if isinstance(item, float) and float(f"{item:g}") == item else str(item) for item in items
    )


def _shown_raw(raw: Any) -> str:
    return "" if raw is _NO_VALUE else shortened(str(raw))


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--lr -4e-4` as `--lr=-4e-4`: argparse takes a negative number with an exponent or a suffix for a flag."""
    joined: list[str] = []
    for token in argv:
        if joined and re.fullmatch(r"--[^=]+", joined[-1]) and _NEGATIVE_NUMBER.fullmatch(token):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def parse_yaml(
    flags: Sequence[Flag], path: str, problems: list[str], hints: Mapping[str, str] | None = None
) -> dict[str, ParsedFlag]:
    """Settings of a YAML file, each through its flag's own converter (YAML reads `4e-4` as a string)."""
    from peft_pretraining.flags import yaml_file  # most commands have no such file

    where = f"--training_config {path}"
    try:
        settings = yaml_file.load(path, as_text=True)
    except OSError as error:
        problems.append(f"{where}: cannot be read ({error.strerror})")
        return {}
    except yaml_file.YamlProblem as error:
        problems.append(f"{where}: not valid YAML ({error})")
        return {}
    if not isinstance(settings, dict):
        problems.append(f"{where}: must be a mapping of flag names to values")
        return {}
    # One file cannot name another: it would never be read.
    by_spelling = {spelling: flag for flag in flags if flag.name != "training_config" for spelling in flag.accepted}
    given: dict[str, ParsedFlag] = {}
    keys: dict[str, str] = {}
    for key, value in settings.items():
        if not isinstance(key, str) or key not in by_spelling:
            shown = key if str(key).isdecimal() else shortened(repr(key))
            problems.append(f"{where}: unknown key {shown}{_advice(str(key), by_spelling.values(), hints or {})}")
            continue
        flag = by_spelling[key]
        if isinstance(value, dict):
            problems.append(f"{where}: {key} must be a single value, got a mapping")
        elif isinstance(value, list) and not all(isinstance(item, str) for item in value):
            problems.append(f"{where}: {key} must be a single value or a list of them")
        elif flag.name in keys:
            problems.append(f"{where}: {keys[flag.name]} and {key} are one setting: give it once")
        elif value is not None:  # `key:` or `key: null` leaves the default
            keys[flag.name] = key
            names = getattr(flag.convert, "allowed", ())  # `no` may be one
            is_switch = (
                isinstance(value, yaml_file.Switch) and flag.convert not in (string, text) and value not in names
            )
            raw = str(value.on) if is_switch else ",".join(map(str, value)) if isinstance(value, list) else str(value)
            _convert(flag, key, raw, path, given, problems)
    return given


def _convert(
    flag: Flag, spelling: str, raw: Any, source: str, given: dict[str, ParsedFlag], problems: list[str]
) -> None:
    if raw is _NO_VALUE:
        if not getattr(flag.convert, "value_is_optional", False):
            problems.append(f"--{spelling} needs a value")
            return
        raw = ""
    try:
        given[flag.name] = ParsedFlag(flag.convert(raw), spelling, source)
    except ValueError as error:
        where = "" if source == "command line" else f" (in {source})"
        problems.append(f"--{spelling} {error}, got {shortened(repr(raw))}{where}")


def _report_unknown(extra: Sequence[str], flags: Sequence[Flag], problems: list[str], hints: Mapping[str, str]) -> None:
    after_unknown_flag = False
    for token in extra:
        if token.startswith("--"):
            name = token[2:].split("=")[0]
            problems.append(f"unknown flag --{shortened(name)}{_advice(name, flags, hints)}")
            after_unknown_flag = "=" not in token
        elif not after_unknown_flag:  # otherwise it is the unknown flag's value
            problems.append(f"unexpected argument {shortened(repr(token))}")


def _advice(name: str, flags: Iterable[Flag], hints: Mapping[str, str]) -> str:
    """What to write instead: what is known about the name, or the name that is next to it and would be accepted."""
    if name in hints:
        return f": {hints[name]}"
    spellings = [spelling for flag in flags if not flag.refused for spelling in flag.spellings]
    close = difflib.get_close_matches(name[:_LONGEST_SHOWN], spellings, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shortened(shown: str, longest: int = _LONGEST_SHOWN) -> str:
    """A value as a message shows it: its beginning, if it is long."""
    return shown if len(shown) <= longest else f"{shown[:longest]}... ({len(shown):,} characters)"


def one_line(message: str) -> str:
    """A message whose line breaks and other control characters (of a file's name) are written as escapes."""
    escaped = (char if char.isprintable() else char.encode("unicode_escape", "surrogatepass") for char in message)
    return "".join(char if isinstance(char, str) else char.decode() for char in escaped)


def exit_with_problems(error: ConfigError) -> int:
    """Print one line per problem on stderr and return the exit code for bad input."""
    for problem in error.problems:
        print(f"error: {shortened(one_line(problem), _LONGEST_LINE)}", file=sys.stderr)
    return EXIT_BAD_INPUT
