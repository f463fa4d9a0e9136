"""Moments in 8 bits: of each block of a row the largest magnitude, and per number one of 256 shares of it.

Dettmers et al., arXiv 2110.02861, with bitsandbytes' dynamic maps: a signed one for first moments, an unsigned one for
second ones. Here a block never goes beyond a row, which bitsandbytes' own kernels do not heed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
"""Numbers with one scale; the last block of a row may have fewer."""
SMALLEST = 4096
"""Numbers of a tensor below which moments stay in float32, as in bitsandbytes."""
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""Moments by their keys in the state; their scales have `_absmax` after that."""


@functools.lru_cache
def quantization_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of a byte, ascending, between -1 and 1 or between 0 and 1."""
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map(signed=signed).to(device)  # type: ignore[no-untyped-call]
    return values


def zero_code(signed: bool) -> int:
    """The byte that means zero, whatever the scale."""
    return int((quantization_map(signed, torch.device("cpu")) == 0).nonzero())


def blocks_of(length: int) -> int:
    """How many scales a row of `length` numbers has."""
    return -(-length // BLOCK)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Bytes (rows, length) and float32 scales (rows, blocks) of float32 numbers (rows, length)."""
    rows, length = values.shape
    blocks = pad(values, (0, blocks_of(length) * BLOCK - length)).view(rows, -1, BLOCK)
    scales = blocks.abs().amax(2)
    levels = quantization_map(signed, values.device)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(2)
    codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes.view(rows, -1)[:, :length], scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 numbers (rows, length) that bytes and scales stand for."""
    rows, length = codes.shape
    shares = quantization_map(signed, codes.device)[codes.int()]
    blocks = pad(shares, (0, blocks_of(length) * BLOCK - length)).view(rows, -1, BLOCK)
    return (blocks * scales.unsqueeze(2)).view(rows, -1)[:, :length]
