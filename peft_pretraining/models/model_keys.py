"""What each key of a LLaMA's JSON may hold, what transformers takes where it is absent, and keys without influence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Key(NamedTuple):
    default: Any
    """What transformers' `LlamaConfig` takes; None stands for "follows from others"."""
    valid: Callable[[Any], bool]
    wanted: str


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a double can hold; true and false are none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= 1e300  # also false for NaN


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_LARGEST = 2**31 - 1
_MOST_LAYERS = 10_000


def _size(value: Any) -> bool:
    return is_integer(value) and 0 < value <= _LARGEST


def _absent_or(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


def _token(value: Any) -> bool:
    return value is None or (is_integer(value) and -1 <= value <= _LARGEST)


def _tokens(value: Any) -> bool:
    return _token(value) or (isinstance(value, list) and all(is_integer(item) and item >= 0 for item in value))


def _llama_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(item, str) and _LLAMA_CLASS.fullmatch(item) for item in value)
    )


_LLAMA_CLASS = re.compile(r"llama(for[a-z]+|model)", re.IGNORECASE)
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("gelu_accurate", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6"),
    *("sigmoid", "silu", "sqrtsoftplus", "swish", "tanh"),
)
"""Those of transformers without weights of their own."""

_BOOLEAN = (lambda value: isinstance(value, bool), "true or false")
_INTEGER = (_size, "a positive integer")
_MAYBE_INTEGER = (_absent_or(_size), "a positive integer")
_TOKEN = (_token, "a token's id or null")
_OBJECT = (_absent_or(lambda value: isinstance(value, dict)), "an object or null")

KEYS: dict[str, Key] = {
    "vocab_size": Key(32000, *_INTEGER),
    "hidden_size": Key(4096, *_INTEGER),
    "intermediate_size": Key(11008, *_INTEGER),
    "num_hidden_layers": Key(
        32, lambda value: _size(value) and value <= _MOST_LAYERS, f"a positive integer up to {_MOST_LAYERS}"
    ),
    "num_attention_heads": Key(32, *_INTEGER),
    "num_key_value_heads": Key(None, *_MAYBE_INTEGER),
    "head_dim": Key(None, *_MAYBE_INTEGER),
    "max_position_embeddings": Key(2048, *_INTEGER),
    "hidden_act": Key("silu", lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
    "initializer_range": Key(0.02, lambda value: is_number(value) and 0 < value <= 1, "a positive number, at most 1"),
    "rms_norm_eps": Key(1e-6, lambda value: is_number(value) and 0 < value <= 1, "a positive number, at most 1"),
    "attention_dropout": Key(0.0, lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "tie_word_embeddings": Key(False, *_BOOLEAN),
    "attention_bias": Key(False, *_BOOLEAN),
    "mlp_bias": Key(False, *_BOOLEAN),
    "rope_theta": Key(10_000.0, lambda value: is_number(value) and 1 <= value <= 1e15, "a number from 1 on"),
    "rope_scaling": Key(None, *_OBJECT),
    "rope_parameters": Key(None, *_OBJECT),
    "pretraining_tp": Key(1, *_MAYBE_INTEGER),
    "bos_token_id": Key(1, *_TOKEN),
    "eos_token_id": Key(2, _tokens, "a token's id, a list of them or null"),
    "pad_token_id": Key(None, *_TOKEN),
    "use_cache": Key(True, *_BOOLEAN),
    "model_type": Key("llama", lambda value: value == "llama", "llama"),
    "architectures": Key(None, _llama_names, "a list of LLaMA's classes, as LlamaForCausalLM"),
}
"""What `LlamaConfig` reads."""

WITHOUT_FUNCTION = frozenset(
    {"use_cache", "model_type", "architectures", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id"}
)
"""Keys in which two JSONs of one model may differ: the last three are the tokenizer's to say in an export."""

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")

WRITTEN_BY_TRANSFORMERS = frozenset({"transformers_version", "dtype", "id2label", "label2id"})
"""In every saved model: not worth a line."""

PASSED_OVER = frozenset(
    {
        *(
            "_name_or_path",
            "_commit_hash",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "attn_implementation",
        ),
        *("torch_dtype", "use_bfloat16", "torchscript", "tf_legacy_loss", "_flash_attn_2_enabled", "use_flash_attn"),
        *("finetuning_task", "problem_type", "task_specific_params", "prefix", "tokenizer_class", "num_labels"),
        *("output_attentions", "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate"),
        *("chunk_size_feed_forward", "gradient_checkpointing", "is_decoder", "is_llama_config", "auto_map"),
        *("sep_token_id", "unk_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        *("unsloth_version", "unsloth_fixed", "onnx", "max_window_layers", "mlx_version", "transformers.js_config"),
    }
)
"""Keys of published files that have no influence on what the model computes in training."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False, None),
    "rope_traditional": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "quantization": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "qk_norm": (False, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "bias": (False, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "pruned_heads": ({}, None),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "layer_types": (None,),
}
"""Keys that change the function of a model, and the values with which they do not."""


def is_neutral(key: str, value: Any) -> bool:
    """Whether a key of `NEUTRAL` leaves the model a LLaMA; true is no 1."""
    if key == "layer_types" and isinstance(value, list):
        return all(item == "full_attention" for item in value)
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[key])


# Rotary embeddings: each kind's own numbers, and whether they are required.

_POSITIVE = (lambda value: is_number(value) and 0 < value <= 1e15, "a positive number")
_FACTOR = (lambda value: is_number(value) and 1 <= value <= 1e9, "a number from 1 on")
_LENGTH = (_size, "a positive integer")
_FACTORS = (
    lambda value: isinstance(value, list) and all(is_number(item) and item > 0 for item in value),
    "a list of positive numbers",
)
_MAYBE = (_absent_or(_POSITIVE[0]), "a positive number")

ROPE_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rope_theta": (KEYS["rope_theta"].valid, KEYS["rope_theta"].wanted),
    "partial_rotary_factor": (lambda value: is_number(value) and value == 1, "1"),
    "factor": _FACTOR,
    "original_max_position_embeddings": _LENGTH,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    "attention_factor": _MAYBE,
    "beta_fast": _MAYBE,
    "beta_slow": _MAYBE,
    "mscale": _MAYBE,
    "mscale_all_dim": _MAYBE,
    "truncate": _BOOLEAN,
}

_ANY_ROPE = ("rope_theta", "partial_rotary_factor")
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), _ANY_ROPE),
    "linear": (("factor",), _ANY_ROPE),
    "dynamic": (("factor",), _ANY_ROPE),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), _ANY_ROPE),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        (*_ANY_ROPE, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        (*_ANY_ROPE, "attention_factor", "factor"),
    ),
}
"""By the kind's name: keys that it requires, and others that it knows."""
