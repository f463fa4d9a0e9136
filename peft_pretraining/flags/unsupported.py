"""Flags that are known only to be refused, or to be passed over, with the reason.

Older launch scripts give them: a command is understood as a whole, and none of its flags is ignored silently.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft_pretraining.flags.settings import Flag, ParsedFlag

_OFF = ("False", "false", "None", "none")


def anything(text: str) -> str:
    """A converter that takes every value, and none."""
    return text


anything.__dict__["value_is_optional"] = True


def refused_flags(reasons: Mapping[str, str]) -> list[Flag]:
    """One flag for each name; its help is why it is refused."""
    return [Flag(name, anything, f"refused: {why}", refused=True) for name, why in reasons.items()]


def check_refused(given: Mapping[str, ParsedFlag], reasons: Mapping[str, str], problems: list[str]) -> None:
    """Adds a problem for each that was given, unless it was turned off."""
    for name, why in reasons.items():
        if name in given and given[name].value not in _OFF:
            problems.append(f"--{given[name].spelling}: {why}")


def passed_over_flags(reasons: Mapping[str, str]) -> list[Flag]:
    """One flag for each name; its help is why it has no effect."""
    return [Flag(name, anything, f"without effect: {why}", refused=True) for name, why in reasons.items()]


def warn_passed_over(given: Mapping[str, ParsedFlag], reasons: Mapping[str, str], warnings: list[str]) -> None:
    """Adds a warning for each that was given."""
    for name, why in reasons.items():
        if name in given:
            warnings.append(f"--{given[name].spelling} has no effect: {why}")
