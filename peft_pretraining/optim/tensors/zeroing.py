"""Zeroing some rows or columns of many matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.sending import send

NUMBERS_AT_ONCE = 2**26
"""Of matrices that are zeroed together."""


class Vectors(NamedTuple):
    """Some rows (`dim` 0) or columns (1) of a matrix, or entries (0) of a vector; this device's part of it."""

    tensor: Tensor
    dim: int
    indices: list[int]


@torch.no_grad()
def zero_vectors(parts: Sequence[Vectors], device: torch.device) -> None:
    """Zero them in place; `device` is where they are."""
    if launches_cost(device):
        zero_together(parts, device)
        return
    for tensor, dim, indices in parts:
        tensor.index_fill_(dim, torch.tensor(indices, dtype=torch.int64), 0)


@torch.no_grad()
def zero_together(parts: Sequence[Vectors], device: torch.device) -> None:
    """All of one shape at once, with a single copy to the device."""
    rows = [part.tensor[index] for part in parts if not part.dim for index in part.indices if part.tensor.ndim == 2]
    if rows:  # these lie in one piece
        torch._foreach_zero_(rows)
    lots = _lots([part for part in parts if part.dim or part.tensor.ndim != 2])
    sizes = [len(lot) * lot[0].tensor.shape[lot[0].dim] for lot in lots]
    masks = torch.split(send(torch.cat([_mask(lot) for lot in lots]), device), sizes) if lots else ()
    for lot, mask in zip(lots, masks, strict=True):
        tensors = [part.tensor for part in lot]
        stack = torch.stack(tensors)  # (L, r) or (L, m, r)
        stack.masked_fill_(mask.view(len(lot), *[1] * (stack.ndim - 2), -1), 0)
        torch._foreach_copy_(tensors, list(stack.unbind()))


def _lots(parts: Sequence[Vectors]) -> list[list[Vectors]]:
    """Of one shape and dtype each, some at a time."""
    kinds: dict[tuple[torch.Size, torch.dtype], list[Vectors]] = {}
    for part in parts:
        kinds.setdefault((part.tensor.shape, part.tensor.dtype), []).append(part)
    lots = []
    for members in kinds.values():
        at_once = max(1, NUMBERS_AT_ONCE // max(1, members[0].tensor.numel()))
        lots += [members[start : start + at_once] for start in range(0, len(members), at_once)]
    return lots


def _mask(lot: Sequence[Vectors]) -> Tensor:
    """Which of their columns, or entries, are to be zeroed: bool, flat, on the host."""
    mask = torch.zeros(len(lot), lot[0].tensor.shape[lot[0].dim], dtype=torch.bool)
    for chosen, part in zip(mask, lot, strict=True):
        chosen[part.indices] = True
    return mask.flatten()
