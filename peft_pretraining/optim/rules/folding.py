"""Means over blocks of neighbouring columns, and what repeats them.

On the CPU as products with small matrices of zeros and ones, which are several times as fast there as sums over, or
copies of, a few numbers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_COLUMNS = 16
"""Of a product that repeats: fewer waste the width of the processor's registers, more are multiplications by zero."""
_PRODUCTS = (torch.float32, torch.float64)
"""Dtypes whose products are fast on the CPU."""


def means(matrix: Tensor, block: int) -> Tensor:
    """(..., n / block): of each block of columns (..., n)."""
    if block == 1:
        return matrix
    blocks = matrix.unflatten(-1, (-1, block))
    if not _by_products(matrix):
        return blocks.mean(-1)
    return torch.mv(blocks.reshape(-1, block), matrix.new_full((block,), 1 / block)).view(blocks.shape[:-1])


def repeat(folded: Tensor, block: int) -> Tensor:
    """(..., n block): each number of (..., n) `block` times; a new tensor."""
    together = _COLUMNS // block
    if together < 1 or folded.numel() % together or not _by_products(folded):
        return folded.unsqueeze(-1).expand(*folded.shape, block).flatten(-2).clone()
    return torch.mm(folded.reshape(-1, together), _repeater(block, folded.dtype)).view(*folded.shape[:-1], -1)


def _by_products(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype in _PRODUCTS and matrix.numel() > 0


@functools.lru_cache
def _repeater(block: int, dtype: torch.dtype) -> Tensor:
    """(16 / block, 16): what a row of numbers is multiplied by, so that each is there `block` times."""
    return torch.eye(_COLUMNS // block, dtype=dtype).repeat_interleave(block, 1)
