"""Reading a LLaMA's shape from JSON, checked without importing transformers.

The JSONs of older code bases load as they are: `max_sequence_length` is taken as `max_position_embeddings`. Any other
key that `LlamaConfig` would keep and ignore is a problem, because a misspelt key would silently train another model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHAPE_DEFAULTS: dict[str, Any] = {  # transformers' LlamaConfig
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "head_dim": None,
}
_LLAMA_KEYS = {
    *_SHAPE_DEFAULTS,
    *("hidden_act", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "attention_dropout"),
    *("mlp_bias", "pretraining_tp", "rope_parameters", "rope_theta", "rope_scaling"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "model_type", "architectures"),
}
# Written by `save_pretrained`, without influence on pre-training.
_HUGGING_FACE_KEYS = {
    *(
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "_attn_implementation_autoset",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
    ),
    *("is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
}
IDENTITY_KEYS = frozenset(_LLAMA_KEYS - {"use_cache", "model_type", "architectures"})
"""What makes two models different."""
KNOWN_KEYS = frozenset(_LLAMA_KEYS | _HUGGING_FACE_KEYS)

_POSITIVE_INTEGERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "num_key_value_heads", "head_dim"),
)
_POSITIVE_NUMBERS = ("rms_norm_eps", "initializer_range")
_BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def read_model_json(path: str, flag: str, problems: list[str]) -> dict[str, Any] | None:
    """The JSON's settings under transformers' names, or None when it cannot be used (with the problems appended)."""
    where = f"{flag} {path}"
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})")
        return None
    except json.JSONDecodeError as error:
        problems.append(f"{where}: not valid JSON ({error})")
        return None
    if not isinstance(settings, dict):
        problems.append(f"{where}: must hold a JSON object")
        return None
    found = _normalise(settings, where)
    found += _shape_problems(settings, where)
    problems += found
    return None if found else settings


def _normalise(settings: dict[str, Any], where: str) -> list[str]:
    """Translate older keys in place."""
    problems = []
    if "max_sequence_length" in settings:
        length = settings.pop("max_sequence_length")
        if settings.setdefault("max_position_embeddings", length) != length:
            problems.append(
                f"{where}: max_sequence_length {length} and max_position_embeddings "
                f"{settings['max_position_embeddings']} contradict each other"
            )
    model_type = settings.get("model_type", "llama")
    if model_type != "llama":
        problems.append(f"{where}: model_type must be llama, got {model_type!r}")
    problems += [f"{where}: unknown key {key!r}" for key in settings if key not in KNOWN_KEYS]
    return problems


def _shape_problems(settings: dict[str, Any], where: str) -> list[str]:
    problems = []
    for key in _POSITIVE_INTEGERS:
        value = settings.get(key, _SHAPE_DEFAULTS[key])
        if value is None and _SHAPE_DEFAULTS[key] is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            problems.append(f"{where}: {key} must be a positive integer, got {value!r}")
    for key in _POSITIVE_NUMBERS:
        value = settings.get(key, 1.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            problems.append(f"{where}: {key} must be a positive number, got {value!r}")
    for key in _BOOLEANS:
        if not isinstance(value := settings.get(key, False), bool):
            problems.append(f"{where}: {key} must be true or false, got {value!r}")
    if problems:
        return problems
    shape = {**_SHAPE_DEFAULTS, **settings}
    hidden, heads, kv_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    if shape["head_dim"] is None and hidden % heads:
        problems.append(f"{where}: num_attention_heads {heads} must divide hidden_size {hidden}")
    elif (shape["head_dim"] or hidden // heads) % 2:
        problems.append(f"{where}: the head dimension {shape['head_dim'] or hidden // heads} must be even (rotary)")
    if kv_heads is not None and heads % kv_heads:
        problems.append(f"{where}: num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    return problems


def vocabulary_size(settings: dict[str, Any]) -> int:
    return settings.get("vocab_size", _SHAPE_DEFAULTS["vocab_size"])


def position_limit(settings: dict[str, Any]) -> int:
    """Longest sequence, in tokens."""
    return settings.get("max_position_embeddings", _SHAPE_DEFAULTS["max_position_embeddings"])


def linear_inputs(settings: dict[str, Any]) -> dict[str, int]:
    """Number of inputs of every linear layer, by dotted name."""
    shape = {**_SHAPE_DEFAULTS, **settings}
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    block = {
        **{f"self_attn.{name}_proj": hidden for name in "qkv"},
        "self_attn.o_proj": heads * (shape["head_dim"] or hidden // heads),
        **{"mlp.gate_proj": hidden, "mlp.up_proj": hidden, "mlp.down_proj": shape["intermediate_size"]},
    }
    blocks = range(shape["num_hidden_layers"])
    return {f"model.layers.{i}.{name}": size for i in blocks for name, size in block.items()} | {"lm_head": hidden}


def parameter_count(settings: dict[str, Any]) -> int:
    """Number of weights (biases, where configured, are left out: this only estimates disk space)."""
    shape = {**_SHAPE_DEFAULTS, **settings}
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head_dim = shape["head_dim"] or hidden // heads
    kv_heads = shape["num_key_value_heads"] or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    tables = (1 if settings.get("tie_word_embeddings") else 2) * shape["vocab_size"] * hidden
    return shape["num_hidden_layers"] * layer + tables + hidden
