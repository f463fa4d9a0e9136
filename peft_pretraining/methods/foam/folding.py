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
    blocks = _in_blocks(matrix, block)
    if not _by_products(matrix):
        return blocks.mean(-1)
    return torch.mv(blocks.reshape(-1, block), matrix.new_full((block,), 1 / block)).view(blocks.shape[:-1])


def repeat(folded: Tensor, block: int) -> Tensor:
    """(..., n block): each number of (..., n) `block` times; a new tensor."""
    together = _together(folded, block)
    if not together:
        return _spread(folded, block).flatten(-2).clone()
    return torch.mm(folded.reshape(-1, together), _repeater(block, folded.dtype)).view(*folded.shape[:-1], -1)


def without_repeated(matrix: Tensor, folded: Tensor, block: int) -> Tensor:
    """`matrix` - repeat(folded, block), a new tensor."""
    together = _together(folded, block)
    if not together:
        return (_in_blocks(matrix, block) - _spread(folded, block)).flatten(-2)
    wide, narrow = matrix.reshape(-1, _COLUMNS), folded.reshape(-1, together)
    return torch.addmm(wide, narrow, _repeater(block, folded.dtype), alpha=-1).view(matrix.shape)


def _in_blocks(matrix: Tensor, block: int) -> Tensor:
    return matrix.reshape(*matrix.shape[:-1], matrix.shape[-1] // block, block)


def _spread(folded: Tensor, block: int) -> Tensor:
    return folded.unsqueeze(-1).expand(*folded.shape, block)


def _together(folded: Tensor, block: int) -> int:
    """How many numbers one row of a product repeats; 0 where there are no products."""
    together = _COLUMNS // block
    possible = together and _COLUMNS % block == 0 and folded.numel() % together == 0 and _by_products(folded)
    return together if possible else 0


def _by_products(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype in _PRODUCTS and matrix.numel() > 0


@functools.lru_cache
def _repeater(block: int, dtype: torch.dtype) -> Tensor:
    """(16 / block, 16): what a row of numbers is multiplied by, so that each is there `block` times."""
    return torch.eye(_COLUMNS // block, dtype=dtype).repeat_interleave(block, 1)
