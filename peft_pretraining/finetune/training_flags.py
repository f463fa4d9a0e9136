"""The flags of transformers' `TrainingArguments`, and those that older versions had, as flags of ours.

Names, types, defaults and descriptions are read from the source of the installed transformers, without importing it: a
command line is checked in a moment, while that import takes seconds. What becomes of each field is in
training_table.py. Every problem is collected instead of ending the process at the first one (flags.py).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peft_pretraining.finetune.training_table import (
    ALIASES,
    AT_LEAST_0,
    BELOW_1,
    CHOICES,
    OBEYED,
    POSITIVE,
    REFUSED,
    SEEDS,
    UP_TO_1,
    WITHOUT_EFFECT,
)
from peft_pretraining.flags import Flag, ParsedFlag, boolean, choice, integer, number, unsupported

_OPTIM_OF_DEFAULT = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
_UNKNOWN = "this version of transformers is newer than what has been tried here"


@dataclass(frozen=True)
class Field:
    """One field of `TrainingArguments` as its source has it."""

    name: str
    type: str
    """The annotation, such as `int | None`."""
    default: Any
    help: str


@cache
def training_fields() -> Mapping[str, Field]:
    """The fields of `TrainingArguments` in the installed transformers, in their order."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("fine-tuning needs transformers (pip install -r requirements.txt)")
    source = Path(next(iter(spec.submodule_search_locations))) / "training_args.py"
    body = next(
        node.body
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    found = (
        _field(node.target.id, node)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
    return {field.name: field for field in found}


def _field(name: str, node: ast.AnnAssign) -> Field:
    keywords = {word.arg: word.value for word in node.value.keywords} if isinstance(node.value, ast.Call) else {}
    default = _literal(keywords.get("default", node.value))
    metadata = keywords.get("metadata")
    entries = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    help = next((_literal(value) for key, value in entries if key is not None and _literal(key) == "help"), None)
    return Field(name, ast.unparse(node.annotation), default, " ".join((help or "").split()))


def _literal(node: ast.expr | None) -> Any:
    """The value of an expression without names in it; None of any other."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def training_defaults() -> dict[str, Any]:
    """What `TrainingArguments` has for every field that is not given."""
    return {name: field.default for name, field in training_fields().items()}


_GROUP = "transformers' Trainer"
_OTHERS = "transformers' Trainer: without effect, or refused"


def training_flags() -> list[Flag]:
    """Every field of `TrainingArguments` by its name and older spellings, and the flags that were dropped."""
    flags = []
    for field in training_fields().values():
        name, dashed = field.name, field.name.replace("_", "-")
        spellings = (*([dashed] if dashed != name else []), *ALIASES.get(name, ()))
        if name in WITHOUT_EFFECT:
            continue
        if name not in OBEYED:
            why = REFUSED.get(name, _UNKNOWN)
            flags.append(Flag(name, unsupported.anything, f"refused: {why}", spellings, refused=True))
            continue
        help = field.help or "as in transformers"
        flags.append(Flag(name, _converter(field), help, spellings, default=field.default))
        if field.type.startswith("bool") and field.default is True:
            flags.append(Flag(f"no_{name}", boolean, f"transformers: turns {name} off", (f"no-{dashed}",)))
    flags += unsupported.passed_over_flags(WITHOUT_EFFECT)
    flags.append(Flag("with_tracking", boolean, "log to wandb: the same as --report_to wandb"))
    flags.append(Flag("group_by_length", boolean, "the same as --train_sampling_strategy group_by_length"))
    flags.append(Flag("adafactor", boolean, "refused: use --optimizer adafactor", refused=True))
    return [dataclasses.replace(flag, group=_OTHERS if flag.refused else _GROUP) for flag in flags]


def _converter(field: Field) -> Callable[[str], Any]:
    """What turns the text of a value into what `TrainingArguments` wants."""
    name, kind = field.name, field.type
    if name in CHOICES:
        return choice(*CHOICES[name])
    if "bool" in kind and "str" not in kind:
        return boolean
    if "list" in kind:
        return lambda text: text.replace(",", " ").split()
    if "int" in kind or "float" in kind:
        return _bounded(name, integer if "float" not in kind else number)
    return _text


def _text(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


def _bounded(name: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """With the limits of training_table.py. `--max_steps -1` and the like stay as transformers has them."""
    bounds: list[tuple[frozenset[str], Callable[[float], bool], str]] = [
        (POSITIVE, lambda value: value > 0, "greater than 0"),
        (AT_LEAST_0, lambda value: value >= 0, "at least 0"),
        (UP_TO_1, lambda value: 0 <= value <= 1, "between 0 and 1"),
        (BELOW_1, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (SEEDS, lambda value: 0 <= value < 2**32, "between 0 and 4294967295"),
    ]

    def checked(text: str) -> Any:
        value = convert(text)
        for names, fits, told in bounds:
            if name in names and not fits(value):
                raise ValueError(f"must be {told}")
        return value

    return checked


def training_values(given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """The keyword arguments of `TrainingArguments` that were given, translated from older spellings."""
    fields = training_fields()
    values: dict[str, Any] = {name: item.value for name, item in given.items() if name in OBEYED}
    for name in [name for name in given if name.startswith("no_") and name[3:] in fields]:
        values[name[3:]] = not given[name].value
    unsupported.warn_passed_over(given, WITHOUT_EFFECT, warnings)
    for name in [name for name in given if name in fields and name not in {*OBEYED, *WITHOUT_EFFECT}]:
        item = given[name]
        if not _is_default(fields[name], str(item.value)):
            shown = f" {item.value}" if item.value else ""
            problems.append(f"--{item.spelling}{shown}: {REFUSED.get(name, _UNKNOWN)}")
    if "adafactor" in given and given["adafactor"].value:
        problems.append("--adafactor: use --optimizer adafactor")
    if "group_by_length" in given and given["group_by_length"].value:
        values["train_sampling_strategy"] = "group_by_length"
    if values.get("include_num_input_tokens_seen") in ("True", "true", "False", "false"):
        values["include_num_input_tokens_seen"] = values["include_num_input_tokens_seen"] in ("True", "true")
    _tracking(given, values, problems, warnings)
    # `--warmup_ratio` has become a `--warmup_steps` below 1.
    if "warmup_steps" in given and given["warmup_steps"].spelling == "warmup_ratio" and values["warmup_steps"] >= 1:
        problems.append(f"--warmup_ratio must be below 1, got {values['warmup_steps']:g}")
    return values


def _is_default(field: Field, text: str) -> bool:
    """Whether a refused flag was given what it is anyway."""
    if field.name == "optim":
        return text in _OPTIM_OF_DEFAULT
    if field.default in (None, False, ""):
        # An empty text is the flag alone, which turns a boolean on.
        return text.lower() in ("false", "none") or (not text and "bool" not in field.type)
    return text.lower() == str(field.default).lower()


def _tracking(
    given: Mapping[str, ParsedFlag], values: dict[str, Any], problems: list[str], warnings: list[str]
) -> None:
    if "with_tracking" in given and given["with_tracking"].value:
        if values.get("report_to", ["wandb"]) not in (["wandb"], ["all"]):
            problems.append(f"--with_tracking logs to wandb, but --report_to is {','.join(values['report_to'])}")
        values.setdefault("report_to", ["wandb"])
    values.setdefault("report_to", ["none"])
    trackers = {"trackio", "all"} & set(values["report_to"])
    for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if name in given and not trackers:
            warnings.append(f"--{given[name].spelling} has no effect without --report_to trackio")
    if "project" in given and not trackers | ({"wandb"} & set(values["report_to"])):
        warnings.append(f"--{given['project'].spelling} has no effect without --report_to")
