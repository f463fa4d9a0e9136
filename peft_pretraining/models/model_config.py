"""Reading a LLaMA's shape from JSON, checked without importing transformers.

The JSONs of older code bases load as they are: `max_sequence_length` is taken as `max_position_embeddings`. Every key
has a type and a range (model_keys.py). Keys of published files without influence are passed over, and said; any other
key that `LlamaConfig` would keep and ignore is a problem, because a misspelt key would silently train another model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_pretraining.models.model_keys import (
    KEYS,
    NEUTRAL,
    PASSED_OVER,
    ROPE_KEYS,
    ROPE_NUMBERS,
    ROPE_TYPES,
    WITHOUT_FUNCTION,
    WRITTEN_BY_TRANSFORMERS,
    is_neutral,
)

IDENTITY_KEYS = frozenset(KEYS.keys() - {"use_cache", "model_type", "architectures"})
"""What makes two models different."""
KNOWN_KEYS = frozenset(KEYS.keys() | PASSED_OVER | NEUTRAL.keys() | WRITTEN_BY_TRANSFORMERS)

_LARGEST_FILE = 2**24
"""Bytes; of published ones a thousandth."""
_LONGEST_VALUE = 60
"""Characters of a value in a message."""


def read_model_json(
    path: str, flag: str, problems: list[str], warnings: list[str] | None = None
) -> dict[str, Any] | None:
    """The JSON's settings under transformers' names, or None when it cannot be used (with the problems appended).

    What is passed over is said in one line, which is added to `warnings`.
    """
    where = f"{flag} {path}"
    try:
        settings = _read_object(Path(path))
    except OSError as error:
        problems.append(f"{where}: cannot be read ({error.strerror or error})")
        return None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        problems.append(f"{where}: not valid JSON ({reason})")
        return None
    if not isinstance(settings, dict):
        problems.append(f"{where}: must hold a JSON object")
        return None
    return checked(settings, where, problems, warnings)


def checked(
    settings: dict[str, Any], where: str, problems: list[str], warnings: list[str] | None = None
) -> dict[str, Any] | None:
    """What a JSON held, under transformers' names, or None when it is no LLaMA that can be trained."""
    found = _normalise(settings, where)
    passed_over = [
        f"{key} (code beside a model is never run)" if key == "auto_map" else key
        for key, value in settings.items()
        if key in PASSED_OVER or (key in NEUTRAL and is_neutral(key, value))
    ]
    if settings.get("pretraining_tp") not in (None, 1):
        passed_over.append("pretraining_tp")
    if passed_over and warnings is not None:
        warnings.append(f"{where}: passed over, without influence on training: {', '.join(passed_over)}")
    found += _value_problems(settings, where) or [*_shape_problems(settings, where), *_rope_problems(settings, where)]
    problems += found
    return None if found else settings


def _read_object(path: Path) -> Any:
    """What a JSON file holds. Raises `OSError`, `ValueError` (also for a key that is there twice), `RecursionError`."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise ValueError(f"it is larger than {_LARGEST_FILE / 1e6:.0f} MB")
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__} that is too long to print"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _normalise(settings: dict[str, Any], where: str) -> list[str]:
    """Translate older keys in place."""
    problems = []
    if "max_sequence_length" in settings:
        length = settings.pop("max_sequence_length")
        if settings.setdefault("max_position_embeddings", length) != length:
            problems.append(
                f"{where}: max_sequence_length {_shown(length)} and max_position_embeddings "
                f"{_shown(settings['max_position_embeddings'])} contradict each other"
            )
    for key, value in settings.items():
        if key in NEUTRAL and not is_neutral(key, value):
            problems.append(f"{where}: {key} {_shown(value)} would make it another model than a LLaMA: not supported")
        elif key not in KNOWN_KEYS:
            problems.append(f"{where}: unknown key {_shown(key)}")
    return problems


def _value_problems(settings: Mapping[str, Any], where: str) -> list[str]:
    """Types and ranges, key by key."""
    return [
        f"{where}: {key} must be {KEYS[key].wanted}, got {_shown(value)}"
        for key, value in settings.items()
        if key in KEYS and not KEYS[key].valid(value)
    ]


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All keys, as transformers completes them, but those of rotary embeddings."""
    shape = {key: settings.get(key, entry.default) for key, entry in KEYS.items() if key not in ROPE_KEYS}
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
    shape["head_dim"] = shape["head_dim"] or shape["hidden_size"] // shape["num_attention_heads"]
    shape["hidden_act"] = {"swish": "silu"}.get(shape["hidden_act"], shape["hidden_act"])
    return shape


def _shape_problems(settings: Mapping[str, Any], where: str) -> list[str]:
    shape = with_defaults(settings)
    hidden, heads, kv_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    problems = []
    if hidden % heads:
        problems.append(f"{where}: num_attention_heads {heads} must divide hidden_size {hidden}")
    elif shape["head_dim"] % 2:
        problems.append(f"{where}: the head dimension {shape['head_dim']} must be even (rotary)")
    if heads % kv_heads:
        problems.append(f"{where}: num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    return problems


def rotary(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings, wherever the JSON has them, with the base and the kind always there."""
    found = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    kind = found.pop("type", "default")
    found.setdefault("rope_type", kind)
    found.setdefault("rope_theta", settings.get("rope_theta", KEYS["rope_theta"].default))
    return {name: value for name, value in found.items() if name != "partial_rotary_factor" and value is not None}


def _rope_problems(settings: Mapping[str, Any], where: str) -> list[str]:
    named = {key: dict(settings[key]) for key in ("rope_parameters", "rope_scaling") if settings.get(key)}
    for key, numbers in named.items():
        kind = numbers.get("rope_type", numbers.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            return [f"{where}: {key} has the unknown rope_type {_shown(kind)}; there is {', '.join(ROPE_TYPES)}"]
        if numbers.get("type", kind) != kind:
            return [f"{where}: {key} has type {_shown(numbers['type'])} and rope_type {kind}: give one of them"]
        required, others = ROPE_TYPES[kind]
        if missing := [name for name in required if name not in numbers]:
            return [f"{where}: {key} of rope_type {kind} lacks {', '.join(missing)}"]
        for name, value in numbers.items():
            if name in ("type", "rope_type"):
                continue
            if name not in (*required, *others):
                return [f"{where}: {key} of rope_type {kind} knows no {_shown(name)}"]
            valid, wanted = ROPE_NUMBERS[name]
            if not valid(value):
                return [f"{where}: {name} of {key} must be {wanted}, got {_shown(value)}"]
    return _rope_contradictions(settings, named, where)


def _rope_contradictions(settings: Mapping[str, Any], named: dict[str, dict[str, Any]], where: str) -> list[str]:
    """Settings of the rotary embedding that are given twice, or cannot go together."""
    if len(named) == 2 and rotary({"rope_parameters": named["rope_parameters"]}) != rotary(named):
        return [f"{where}: rope_parameters and rope_scaling contradict each other: give one of them"]
    if len(named) == 2 and rotary({"rope_scaling": named["rope_scaling"]}) != rotary(named):
        return [f"{where}: rope_parameters and rope_scaling contradict each other: give one of them"]
    base = settings.get("rope_theta")
    for key, numbers in named.items():
        if base is not None and numbers.get("rope_theta", base) != base:
            return [f"{where}: rope_theta {base} and {numbers['rope_theta']} of {key} contradict each other"]
    found, shape = rotary(settings), with_defaults(settings)
    if found["rope_type"] == "llama3" and found["high_freq_factor"] <= found["low_freq_factor"]:
        return [
            f"{where}: high_freq_factor {found['high_freq_factor']} must be above low_freq_factor "
            f"{found['low_freq_factor']}"
        ]
    if found["rope_type"] == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(found[name]) != shape["head_dim"] // 2:
                return [f"{where}: {name} must have {shape['head_dim'] // 2} numbers, got {len(found[name])}"]
    return []


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys in which two models differ, with both values, after both were completed as transformers does.

    The ids of special tokens and what else does not change the model (`WITHOUT_FUNCTION`) are not looked at.
    """
    one, two = ({**with_defaults(settings), **rotary(settings)} for settings in (first, second))
    found = [name for name in dict.fromkeys((*one, *two)) if one.get(name) != two.get(name)]
    implied = {"head_dim": {"hidden_size", "num_attention_heads"}, "num_key_value_heads": {"num_attention_heads"}}
    return [
        (name, one.get(name), two.get(name))
        for name in found
        if name not in WITHOUT_FUNCTION and not implied.get(name, set()) & set(found)
    ]


def contradictions(saved: Mapping[str, Any], given: Mapping[str, Any], where: str, other: str) -> list[str]:
    """Why the weights of one model cannot be taken for another; `where` and `other` name the two."""
    return [
        f"{where}: its {key} {_shown(value)} differs from {_shown(wanted)} of {other}"
        for key, value, wanted in differences(saved, given)
    ]


def memory_problem(settings: Mapping[str, Any], bytes_per_number: int, devices: int) -> str | None:
    """Why this machine cannot hold a device's part of the weights alone; None if it can, or its size is unknown."""
    try:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    needed = parameter_count(dict(settings)) * bytes_per_number / devices
    if needed <= available:
        return None
    return f"its weights take {needed / 1e9:.1f} GB, and this machine has {available / 1e9:.1f}"


def vocabulary_size(settings: dict[str, Any]) -> int:
    return settings.get("vocab_size", KEYS["vocab_size"].default)


def position_limit(settings: dict[str, Any]) -> int:
    """Longest sequence, in tokens."""
    return settings.get("max_position_embeddings", KEYS["max_position_embeddings"].default)


def linear_inputs(settings: dict[str, Any]) -> dict[str, int]:
    """Number of inputs of every linear layer, by dotted name."""
    shape = with_defaults(settings)
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    block = {
        **{f"self_attn.{name}_proj": hidden for name in "qkv"},
        "self_attn.o_proj": heads * shape["head_dim"],
        **{"mlp.gate_proj": hidden, "mlp.up_proj": hidden, "mlp.down_proj": shape["intermediate_size"]},
    }
    blocks = range(shape["num_hidden_layers"])
    return {f"model.layers.{i}.{name}": size for i in blocks for name, size in block.items()} | {"lm_head": hidden}


def parameter_count(settings: dict[str, Any]) -> int:
    """Number of weights, a tied table's counted once."""
    shape = with_defaults(settings)
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    layer = hidden * head * (2 * heads + 2 * kv_heads) + 3 * hidden * inner + 2 * hidden
    if shape["attention_bias"]:
        layer += head * (heads + 2 * kv_heads) + hidden
    if shape["mlp_bias"]:
        layer += 2 * inner + hidden
    tables = (1 if shape["tie_word_embeddings"] else 2) * shape["vocab_size"] * hidden
    return shape["num_hidden_layers"] * layer + tables + hidden
