"""What a launcher says of this process, in variables of the environment as torchrun sets them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from peft_pretraining.flags import EXIT_BAD_INPUT, ConfigError, exit_with_problems

_SMALLEST = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
_OF_A_GROUP = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_SECONDS_TO_SPEAK = 10.0
"""How long other processes of a machine let the first one speak."""


def world_size(environ: Mapping[str, str], problems: list[str]) -> int:
    """Returns the number of processes; 1 where the variable says nothing that is one, which is added to `problems`."""
    number = _whole_number(environ, "WORLD_SIZE", problems)
    return 1 if number is None else number


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of a group, be it the only one."""
    size = environ.get("WORLD_SIZE")
    return size is not None and (size != "1" or all(map(environ.get, _OF_A_GROUP)))


def launcher_problems(environ: Mapping[str, str]) -> list[str]:
    """Returns what is wrong with the variables, one line each."""
    problems: list[str] = []
    numbers = {name: _whole_number(environ, name, problems) for name in _SMALLEST}
    size, rank = numbers["WORLD_SIZE"], numbers["RANK"]
    if problems or size is None or not is_launched(environ):
        return problems
    if missing := [name for name in _OF_A_GROUP if not environ.get(name)]:
        return [
            f"WORLD_SIZE is {size}, but {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set: start it "
            "with torchrun, or unset WORLD_SIZE for one process"
        ]
    port = environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        problems.append(f"MASTER_PORT must be a port's number, got {port!r}")
    if rank is not None and rank >= size:
        problems.append(f"RANK {rank} must be below WORLD_SIZE {size}")
    local_size, local_rank = numbers["LOCAL_WORLD_SIZE"], numbers["LOCAL_RANK"]
    if local_size is not None and local_rank is not None and local_rank >= local_size:
        problems.append(f"LOCAL_RANK {local_rank} must be below LOCAL_WORLD_SIZE {local_size}")
    return problems


def check_launcher(environ: Mapping[str, str] | None = None) -> None:
    """Raises `ConfigError` where the launcher's variables cannot be right."""
    if problems := launcher_problems(os.environ if environ is None else environ):
        raise ConfigError(problems)


def bad_input(error: ConfigError) -> int:
    """Print the problems, and return the exit code: one process per machine speaks.

    Usually all find the same problems. torchrun ends the others when the first exits, which must not be one that has
    said nothing; so the first speaks, and the others only if they are still there later: then it saw no problem.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if local_rank.isdigit() and int(local_rank) > 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_SECONDS_TO_SPEAK + min(int(local_rank), 16) / 2)
    exit_with_problems(error)
    return EXIT_BAD_INPUT


def _whole_number(environ: Mapping[str, str], name: str, problems: list[str]) -> int | None:
    """Returns None where it is not set, or is wrong, which is added to `problems`."""
    if (text := environ.get(name)) is None:
        return None
    smallest = _SMALLEST[name]
    if text.isascii() and text.isdigit() and int(text[:20]) >= smallest and len(text) < 10:
        return int(text)
    problems.append(
        f"{name} must be a whole number of at least {smallest}, got {text!r}: torchrun sets it, one process needs none"
    )
    return None
