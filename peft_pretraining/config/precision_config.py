"""In which numbers a model is kept, computed and trained: a section of `Config`, and what its settings come to.

Nothing here imports torch: dtypes are named as torch names them.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import choice, setting

PRECISIONS = ("auto", "mixed", "bf16", "bf16_sr", "fp32", "fp64")
OF_DTYPE = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
"""What `--dtype` says -> the precision that it means."""


@dataclass(frozen=True)
class PrecisionConfig:
    precision: str = setting(
        "auto",
        choice(*PRECISIONS),
        "weights and arithmetic: mixed (float32 weights, bfloat16 products; 4 bytes a weight), bf16_sr (bfloat16 "
        "weights rounded stochastically, float32 norms; 2 bytes), bf16 (all bfloat16, rounded to nearest, as "
        "published; 2 bytes, and small updates are lost), fp32, fp64 (default: mixed on CUDA, fp32 on the CPU)",
    )
    state_dtype: str = setting(
        "auto",
        choice("auto", "float32", "weight", "published"),
        "optimizer states beside bfloat16 weights: float32; weight (first moments and bases bfloat16, second moments "
        "float32); published (all bfloat16, as the papers' runs; not for methods that compute in float32) "
        "(default: published with bf16 and 8-bit moments, else float32)",
    )
    matmul_precision: str | None = setting(
        None,
        choice("highest", "high", "medium"),
        "float32 products on CUDA: highest (full), high or medium (TF32, some 5 times as fast); bases and merges are "
        "always full (default: high)",
    )
    basis_dtype: str = setting(
        "auto",
        choice("auto", "float32", "weight", "int8"),
        "bases of projections: float32, weight (as the weights), int8 (1 byte a number, blocks with a float32 scale) "
        "(default: as the states)",
    )
    gradient_sum_dtype: str = setting(
        "float32",
        choice("float32", "weight", "int8"),
        "per-layer updates beside bfloat16 weights: sums of gradients over micro-batches; weight keeps them in "
        "bfloat16, int8 those of projected gradients in blocks of 8 bits, both rounded stochastically",
    )


@dataclass(frozen=True)
class Precision:
    """What a run computes in, settled for its device."""

    name: str
    """One of `PRECISIONS`, but auto."""
    weight_dtype: str
    """Of matrices, embedding, head and low-rank factors."""
    norm_dtype: str
    """Of norms' weights."""
    compute_dtype: str
    """Of activations and products."""
    rounding: str
    """How weights in fewer digits than the update move: nearest or stochastic."""
    state_format: str
    """Of optimizer states: published, weight or float32. Beside weights of 32 bits and more they are all the same."""
    compact: bool = False
    """Whether the update rule's moments are in 8 bits."""

    @property
    def casts(self) -> bool:
        """Whether some weights are in another dtype than activations."""
        return {self.weight_dtype, self.norm_dtype} != {self.compute_dtype}

    @property
    def state_dtype(self) -> str:
        """Of moments and bases, unless a flag or a rule says otherwise; in words."""
        if self.weight_dtype != "bfloat16":
            return f"8 bits, bases {self.weight_dtype}" if self.compact else self.weight_dtype
        if self.compact:
            return f"8 bits, bases {'float32' if self.state_format == 'float32' else 'bfloat16'}"
        words = {"float32": "float32", "published": "bfloat16", "weight": "bfloat16 but second moments float32"}
        return words[self.state_format]

    def __str__(self) -> str:
        """
        >>> print(resolve(PrecisionConfig("bf16_sr"), "auto", "cpu"))
        precision bf16_sr: weights bfloat16 (stochastic rounding), norms float32, compute bfloat16, states float32
        """
        rounding = " (stochastic rounding)" if self.rounding == "stochastic" else ""
        return (
            f"precision {self.name}: weights {self.weight_dtype}{rounding}, norms {self.norm_dtype}, "
            f"compute {self.compute_dtype}, states {self.state_dtype}"
        )


_KINDS = {
    "mixed": ("float32", "float32", "bfloat16"),
    "bf16": ("bfloat16", "bfloat16", "bfloat16"),
    "bf16_sr": ("bfloat16", "float32", "bfloat16"),
    "fp32": ("float32", "float32", "float32"),
    "fp64": ("float64", "float64", "float64"),
}
"""Precision -> dtypes of weights, of norms, of products."""


def name_of(config: PrecisionConfig, dtype: str, device_type: str | None = None) -> str:
    """The precision that the settings ask for, `dtype` being that of `--dtype`; auto where they ask for none and the
    device is not known.

    >>> name_of(PrecisionConfig(), "auto"), name_of(PrecisionConfig(), "auto", "cuda")
    ('auto', 'mixed')
    """
    if config.precision != "auto":
        return config.precision
    by_device = {None: "auto", "cuda": "mixed"}
    return OF_DTYPE.get(dtype) or by_device.get(device_type, "fp32")


def resolve(config: PrecisionConfig, dtype: str, device_type: str, compact: bool = False) -> Precision:
    """What the settings come to on a device, with an update rule that is `compact` or not.

    >>> resolve(PrecisionConfig(), "bfloat16", "cuda").state_format
    'published'
    >>> [resolve(PrecisionConfig("bf16_sr"), "auto", "cuda", compact).state_format for compact in (False, True)]
    ['float32', 'published']
    """
    name = name_of(config, dtype, device_type)
    weights, norms, compute = _KINDS[name]
    state_format = config.state_dtype
    if state_format == "auto" or weights != "bfloat16":
        state_format = "float32" if name == "bf16_sr" and not compact else "published"
    rounding = "stochastic" if name == "bf16_sr" else "nearest"
    return Precision(name, weights, norms, compute, rounding, state_format, compact)


WEIGHT_BYTES = {"fp64": 8, "fp32": 4, "mixed": 4, "bf16": 2, "bf16_sr": 2, "auto": 2}
"""Bytes of a weight, at least."""
