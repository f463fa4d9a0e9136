"""A study's YAML file: which training script, methods, rates and seeds, and with which flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _study.folder import is_number
from _study.programs import PROGRAMS, Program
from peft_pretraining.flags import ConfigError, yaml_file

_DEFAULT = "torchrun_main.py"


@dataclass(frozen=True)
class Method:
    """One row of the table: what is trained at each of its rates."""

    lrs: tuple[float, ...]
    flags: Mapping[str, Any]
    warm_up: Mapping[str, Any] | None = None
    """Flags of a run without the method, from whose last checkpoint this one's runs start."""


@dataclass(frozen=True)
class StudyFile:
    """A study as its file has it."""

    program: Program
    common: Mapping[str, Any]
    methods: Mapping[str, Method]
    seeds: tuple[int | None, ...] = (None,)
    """None: the training script's own."""
    evaluation_rows: int | None = None
    """So many of the rows of --data, drawn at random, are for evaluation."""
    keep_models: bool = True
    extend: int = 0
    """So many rates at most are tried beyond a method's, where the best is the smallest or the largest."""
    start: Mapping[str, Any] | None = None
    """Flags of a run from whose last checkpoint all others start, instead of from `model_config`'s random weights."""
    baseline: str | None = None
    """The method from which the table tells every other's difference, seed by seed."""
    entries: Mapping[str, Any] = field(default_factory=dict)
    """The methods' entries as the file has them."""


def read_study(path: Path) -> StudyFile:
    """Returns the study of a file. Raises `ConfigError` with everything that is wrong with it."""
    try:
        found = yaml_file.load_mapping(path)
    except yaml_file.YamlProblem as error:
        raise ConfigError([f"{path}: {error}"]) from None
    program = PROGRAMS.get(str(found.get("script", _DEFAULT)))
    if program is None:
        raise ConfigError([f"{path}: script must be one of {', '.join(PROGRAMS)}, got {found['script']!r}"])
    if problems := _problems(found, program):
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    methods = {
        name: Method(tuple(entry["lrs"]), entry["flags"], entry.get("warm_up"))
        for name, entry in found["methods"].items()
    }
    return StudyFile(
        program,
        found["common"],
        methods,
        tuple(found.get("seeds", (None,))),
        found.get("evaluation_rows"),
        found.get("keep_models", True),
        found.get("extend", 0),
        found.get("start"),
        found.get("baseline"),
        found["methods"],
    )


def _problems(found: Mapping[str, Any], program: Program) -> list[str]:
    known = ("script", "seeds", "common", "methods", "baseline", *program.keys)
    problems = [f"unknown key {key!r}" for key in found if key not in known or key == "warm_up"]
    seeds = found.get("seeds")
    if "seeds" in found and not _is_list(seeds, lambda seed: _is_whole(seed) and seed >= 0):
        problems.append(f"seeds must be a list of different whole numbers, got {seeds!r}")
    rows, keep = found.get("evaluation_rows", 1), found.get("keep_models", True)
    if not _is_whole(rows) or rows < 1:
        problems.append(f"evaluation_rows must be a positive whole number, got {rows!r}")
    if not isinstance(keep, bool):
        problems.append(f"keep_models must be True or False, got {keep!r}")
    if not _is_whole(extend := found.get("extend", 0)) or extend < 0:
        problems.append(f"extend must be a whole number, got {extend!r}")
    problems += _flags_problems("common", found.get("common"), program.required)
    if "start" in found and "start" in program.keys:
        problems += _flags_problems("start", found["start"], ("num_training_steps", "lr"))
    methods = found.get("methods")
    if not isinstance(methods, dict) or not methods:
        return [*problems, f"methods must be a mapping of names to entries, got {methods!r}"]
    if (baseline := found.get("baseline", next(iter(methods)))) not in methods:
        problems.append(f"baseline must be one of the methods, got {baseline!r}")
    for name, entry in methods.items():
        problems += _entry_problems(name, entry, program)
    return problems


def _entry_problems(name: Any, entry: Any, program: Program) -> list[str]:
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        return [f"methods: {name!r} cannot be the name of a folder"]
    if not isinstance(entry, dict):
        return [f"methods: {name} must be a mapping with lrs and flags, got {entry!r}"]
    known = ("lrs", "flags", *({"warm_up"} & set(program.keys)))
    problems = [f"methods: {name}: unknown key {key!r}" for key in entry if key not in known]
    lrs = entry.get("lrs")
    if not _is_list(lrs, lambda lr: is_number(lr) and lr > 0):
        problems.append(
            f"methods: {name}: lrs must be a list of different positive numbers (4.0e-4, not 4e-4), got {lrs!r}"
        )
    problems += _flags_problems(f"methods: {name}: flags", entry.get("flags"), ())
    if "warm_up" in entry and "warm_up" in known:
        problems += _flags_problems(f"methods: {name}: warm_up", entry["warm_up"], ("num_training_steps", "lr"))
    return problems


def _flags_problems(what: str, flags: Any, required: Sequence[str]) -> list[str]:
    if not isinstance(flags, dict) or not all(isinstance(name, str) for name in flags):
        return [f"{what} must be a mapping of flags to values, got {flags!r}"]
    problems = [f"{what}: {name} must be a single value" for name, v in flags.items() if isinstance(v, (dict, list))]
    return problems + [
        f"{what}: {name} must be a positive number, got {flags.get(name)!r}"
        for name in required
        if not is_number(flags.get(name)) or flags[name] <= 0
    ]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_item, value)) and len(set(value)) == len(value)


def flags_of(words: Sequence[str]) -> dict[str, Any]:
    """Returns the flags of a command line by name; True for those without a value, numbers as such.

    Raises `ConfigError` for what stands behind no flag.
    """
    flags: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            flags[name] = _value(value) if has_value else True
            name = None if has_value else name
        elif name is None:
            raise ConfigError([f"unexpected argument {word!r} among the training script's flags"])
        else:
            flags[name], name = _value(word), None
    return flags


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
