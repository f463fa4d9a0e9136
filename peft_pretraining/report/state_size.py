"""The optimizer state of a run's matrices, by the formula of its method: before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft_pretraining.config import Config
from peft_pretraining.flags.state_size import elements
from peft_pretraining.methods import METHODS
from peft_pretraining.models.model_config import with_defaults


def formula(config: Config) -> str:
    """Elements for an m x n matrix, and what the letters beside m and n are in this run: mr + 2nr, r = 128."""
    spec = METHODS[config.method.method]
    letters = {name: value(config.method) for name, (_, value) in spec.state_letters.items()}
    if "r" in spec.state and (rank := getattr(config.method, "rank", None)) is not None:
        letters = {"r": rank, **letters}
    return ", ".join([spec.state, *(f"{name} = {value:g}" for name, value in letters.items())])


def of_matrix(config: Config, rows: int, columns: int, blocks: int) -> int:
    """Elements for the weight of a linear layer; `blocks` are its attention heads, or its rows."""
    spec, m, n = METHODS[config.method.method], min(rows, columns), max(rows, columns)
    own = {name: value(config.method) for name, (_, value) in spec.state_letters.items()}
    rank = min(getattr(config.method, "rank", None) or m, m)
    return elements(spec.state, {"m": m, "n": n, "r": rank, "outputs": rows, "blocks": blocks, **own})


def matrices(shape: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Rows, columns, and heads or rows, of the linear layers of all decoder layers of a LLaMA, of which a JSON may say
    a part."""
    shape = with_defaults(shape)
    hidden, inner, size = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, of_keys = shape["num_attention_heads"], shape["num_key_value_heads"]
    for _ in range(shape["num_hidden_layers"]):
        yield heads * size, hidden, heads
        yield of_keys * size, hidden, of_keys
        yield of_keys * size, hidden, of_keys * size
        yield hidden, heads * size, hidden
        yield from ((inner, hidden, inner), (inner, hidden, inner), (hidden, inner, hidden))


def line(config: Config, shape: Mapping[str, Any]) -> str:
    """What the matrices of a model keep, in words."""
    found = list(matrices(shape))
    total = sum(of_matrix(config, *matrix) for matrix in found)
    rule = METHODS[config.method.method].update_rules
    with_adamw = ", with AdamW" if len(rule) > 1 else ""
    return (
        f"optimizer state of an m x n matrix, m <= n{with_adamw}: {formula(config)}; of the {len(found)} matrices of "
        f"the decoder {total:,} elements, {4e-6 * total:,.1f} MB in float32, without embedding, head and norms"
    )
