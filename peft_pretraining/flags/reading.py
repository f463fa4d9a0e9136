"""All settings of a command: its command line, over the YAML file that it may name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_pretraining.flags.converters import string
from peft_pretraining.flags.settings import Flag, ParsedFlag, parse_command_line, parse_yaml

TRAINING_CONFIG = Flag("training_config", string, "YAML file with any of these settings; the command line wins")


def read_flags(
    flags: Sequence[Flag],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    problems: list[str],
    warnings: list[str],
    hints: Mapping[str, str] | None = None,
) -> dict[str, ParsedFlag]:
    """Returns what was given, by the flags' names. Problems and warnings are appended to the lists.

    flags: with `TRAINING_CONFIG` among them. hints: what to say of flags that do not exist, by name.
    """
    given = parse_command_line(flags, argv, prog=prog, description=description, problems=problems, hints=hints)
    if TRAINING_CONFIG.name in given:
        given = {**parse_yaml(flags, given[TRAINING_CONFIG.name].value, problems, hints), **given}
    warnings += [
        f"{item.replaced} has no effect: --{item.spelling}, which is the same setting, was given after it"
        for item in given.values()
        if item.replaced is not None
    ]
    return given
