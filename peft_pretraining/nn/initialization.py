"""First values of the factors. All draws are on the CPU, so that they are the same on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_pretraining.nn.low_rank_linear import LowRankLinear, working_dtype

_GAIN = math.sqrt(1 / 3)
"""Kaiming's gain for a leaky ReLU of slope √5, as torch initialises linear layers."""


def kaiming_bound(n: int) -> float:
    """LoRA's A (r, n) is U(±1/√n): Kaiming uniform with a = √5."""
    return 1 / math.sqrt(n)


def switchlora_bounds(m: int, n: int, rank: int) -> tuple[float, float]:
    """Bounds of the uniform entries of A (r, n) and B (m, r), for s = 1/r (SwitchLoRA, arXiv 2406.06564).

    Then the entries of s·B·A have the variance of torch's default dense weight, whatever the rank, and gradients of A
    and B are of one size.
    """
    std_a = (math.sqrt(m) * rank / n**1.5) ** 0.25 * math.sqrt(_GAIN)
    std_b = (rank / math.sqrt(m * n)) ** 0.25 * math.sqrt(_GAIN)
    return math.sqrt(3) * std_a, math.sqrt(3) * std_b


def uniform(shape: tuple[int, ...], bound: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """U(±bound), drawn on the CPU in float32 (float64 for float64), in the dtype and on the device of `like`."""
    drawn = torch.empty(shape, dtype=working_dtype(like.dtype)).uniform_(-bound, bound, generator=generator)
    return drawn.to(like.device, like.dtype)


def fill_uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """The same into a tensor, and without a copy where that is possible."""
    if tensor.device.type == "cpu" and tensor.dtype == working_dtype(tensor.dtype):
        tensor.uniform_(-bound, bound, generator=generator)
    else:
        tensor.copy_(uniform(tuple(tensor.shape), bound, tensor, generator))


def draw_kaiming_a(layer: LowRankLinear, generator: torch.Generator) -> Tensor:
    return uniform((layer.rank, layer.in_features), kaiming_bound(layer.in_features), layer.lora_A, generator)


def draw_factors(
    layer: LowRankLinear, kind: str, generator: torch.Generator, zero_b: bool = False
) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r); `kind` is origin_lora (B zero) or switchlora."""
    m, n, rank = layer.out_features, layer.in_features, layer.rank
    if kind == "origin_lora":
        return draw_kaiming_a(layer, generator), torch.zeros_like(layer.lora_B)
    bound_a, bound_b = switchlora_bounds(m, n, rank)
    a = uniform((rank, n), bound_a, layer.lora_A, generator)
    b = uniform((m, rank), bound_b, layer.lora_B, generator)
    return a, torch.zeros_like(b) if zero_b else b


def draw_factors_alone(layer: LowRankLinear, dense: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B that take the place of a dense weight (m, n): s·B·A has its standard deviation.

    With B = 0, as beside a frozen weight, every layer's output would be zero, and through two such layers in a row
    (values and their output, up and down) neither would ever get a gradient.
    """
    a = draw_kaiming_a(layer, generator)
    std_a = kaiming_bound(layer.in_features) / math.sqrt(3)
    scale = abs(float(layer.current_scale()))
    std_b = float(dense.to(working_dtype(dense.dtype)).std()) / (scale * std_a * math.sqrt(layer.rank))
    b = uniform((layer.out_features, layer.rank), math.sqrt(3) * std_b, layer.lora_B, generator)
    return a, b
