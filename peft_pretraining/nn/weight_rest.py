"""A weight in 16 bits that is corrected often, and what rounding takes from it: together its value in float32.

A correction is mostly smaller than the weight's last digit: rounded after each one, a bfloat16 weight drifts by per
cents of itself in some hundred corrections. So a value x is kept as W, x rounded to the model's dtype, which products
read, and as an int16 of the same shape, its rest:

    bfloat16    bits of x − bits of W as float32: x to the last bit (at a tie, to the last but one)
    float16     the bits of 2¹¹ · (x − W) in float16: x to 22 bits
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT16_SHIFT = 2.0**11


def has_rest(dtype: torch.dtype) -> bool:
    """Whether float32 corrections of a weight of this dtype lose digits."""
    return dtype in (torch.bfloat16, torch.float16)


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """The value in float32."""
    if weight.dtype == torch.float16:
        return weight.float() + rest.view(torch.float16).float() / _FLOAT16_SHIFT
    return ((weight.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def split(value: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Write a value in float32 into a weight and its rest."""
    weight.copy_(value)
    if weight.dtype == torch.float16:
        rest.copy_(((value - weight.float()) * _FLOAT16_SHIFT).to(torch.float16).view(torch.int16))
        return
    difference = value.view(torch.int32) - (weight.view(torch.int16).to(torch.int32) << 16)
    rest.copy_(difference.clamp_(-(2**15), 2**15 - 1))
