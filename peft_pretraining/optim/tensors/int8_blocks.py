"""Tensors of 8 bits: whole numbers from -127 to 127, and one float32 scale for every 256 of them in a row.

A number is code x scale, with scale = (largest magnitude of its block) / 127 (absmax, as in arXiv 2208.07339), so that
zero is exact and signs are symmetric. Blocks lie along one dimension: a basis has them along its vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
_LARGEST = 127


def scales_shape(shape: torch.Size, dim: int) -> torch.Size:
    """Of the scales of a tensor with blocks along `dim`; the last block may be shorter."""
    return torch.Size((*shape[:dim], -(-shape[dim] // BLOCK), *shape[dim + 1 :]))


def quantize(values: Tensor, dim: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (int8, in the shape of `values`) and scales (float32). Rounded to nearest, or with `noise`, uniform in
    [0, 1) and in the same shape, stochastically: then the mean over the noise is `values`."""
    values = values.float()
    length = values.shape[dim]
    padded = values.movedim(dim, -1)
    if length % BLOCK:
        padded = F.pad(padded, (0, -length % BLOCK))
    scales = torch.unflatten(padded, -1, (-1, BLOCK)).abs().amax(-1) / _LARGEST
    steps = _times(values, (1 / scales).nan_to_num_(posinf=0.0).movedim(-1, dim), dim)
    rounded = steps.round_() if noise is None else steps.add_(noise).floor_()
    return rounded.clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales.movedim(-1, dim).contiguous()


def quantize_vectors(basis: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of vectors along `dim`, whose lengths stay what they were."""
    basis = basis.float()
    codes, scales = quantize(basis, dim)
    kept = dequantize(codes, scales, dim, torch.float32)
    was, now = (torch.linalg.vector_norm(each, dim=dim, keepdim=True) for each in (basis, kept))
    return codes, scales.mul_(torch.where(now > 0, was / now, 1.0))


def dequantize(codes: Tensor, scales: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The numbers that codes and scales stand for, in a new tensor."""
    return _times_(codes.to(dtype), scales, dim)


def _times(values: Tensor, scales: Tensor, dim: int) -> Tensor:
    return _times_(values.clone(), scales, dim)


def _times_(values: Tensor, scales: Tensor, dim: int) -> Tensor:
    """Multiplies each block by its scale, in place."""
    length = values.shape[dim]
    whole = length // BLOCK
    if whole:
        body = torch.unflatten(values.narrow(dim, 0, whole * BLOCK), dim, (whole, BLOCK))
        body.mul_(scales.narrow(dim, 0, whole).unsqueeze(dim + 1))
    if length % BLOCK:
        values.narrow(dim, whole * BLOCK, length % BLOCK).mul_(scales.narrow(dim, whole, 1))
    return values
