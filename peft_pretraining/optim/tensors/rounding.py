"""Stochastic rounding to bfloat16: up or down with the probability that keeps the mean.

A bfloat16 weight has neighbours 2^-8 of it away. What is less than half of that rounding to nearest loses, in every
update; rounded stochastically, it arrives on average. Noise is a function of (seed, update, parameter's name, row,
column), computed by whole-number arithmetic: no generator's state has to be saved, and every kind of device, and every
way to divide a weight over devices, rounds alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_pretraining import rng
from peft_pretraining.distributed.sharding import WHOLE, ShardInfo

NUMBERS_AT_ONCE = 2**22
"""Of a weight that is widened by rows: its float32 copy and the noise are 16 MB each."""

NUMBERS_IN_CACHE = 2**18
"""Of a block of rows that stays in a CPU's caches, with what is computed of it: 1 MB each. Shorter blocks cost more
calls, longer ones memory that is asked for anew."""

# Odd multipliers with well-spread bits, as signed 32-bit numbers.
_MULTIPLIERS = (0x2C1B3C6D, 0x297A2D39)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_COLUMNS = 2**32
"""Where the numbers of columns begin, beyond those of all rows."""


@dataclass(frozen=True)
class Noise:
    """Which numbers a weight is rounded with in one update."""

    seed: int
    name: str
    step: int
    shard: ShardInfo = WHOLE
    """Which part of the weight this device has."""

    @property
    def key(self) -> int:
        """What the numbers of this weight and update are made of."""
        return rng.derive_seed(self.seed, f"rounding of {self.name}", self.step)

    def vectors(self, rows: slice, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
        """32 bits for each of these rows of this device's part, and for each entry of a row, which is of `shape`:
        int32, flat."""
        places = self.places(rows, shape, device)
        bits = hashed(self.key, places)
        return bits[: rows.stop - rows.start], bits[rows.stop - rows.start :]

    def places(self, rows: slice, shape: torch.Size, device: torch.device) -> Tensor:
        """The numbers of these rows, and of the entries of a row, in the whole weight: int64, flat."""
        offset = self.shard.offset if self.shard.dim == 0 else 0
        of_rows = torch.arange(offset + rows.start, offset + rows.stop, device=device)
        if self.shard.dim:
            whole = self.shard.shape[1:]
            of_columns = torch.arange(_COLUMNS, _COLUMNS + whole.numel(), device=device).view(whole)
            of_columns = self.shard.part(of_columns, self.shard.dim - 1).reshape(-1)
        else:
            of_columns = torch.arange(_COLUMNS, _COLUMNS + shape.numel(), device=device)
        return torch.cat((of_rows, of_columns))


def hashed(key: int | Tensor, index: Tensor) -> Tensor:
    """32 well-mixed bits for each number, int32. `index` (int64) is used up. Keys of several weights: int64 (L, 1)."""
    x = index.add_(1).mul_(_GOLDEN).bitwise_xor_(key)
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x.bitwise_xor_((x >> shift) & (2 ** (64 - shift) - 1)).mul_(multiplier)
    return (x >> 32).to(torch.int32)


def crossed(by_row: Tensor, by_column: Tensor) -> Tensor:
    """Whole numbers from 0 to 65535, int32 (..., rows, columns)."""
    x = by_row.unsqueeze(-1) + by_column.unsqueeze(-2)  # wraps around
    x.mul_(_MULTIPLIERS[0])
    x.bitwise_xor_(x >> 15)
    x.mul_(_MULTIPLIERS[1])
    # The upper half, which depends on all bits; the shift carries the sign along.
    return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def round_stochastically(target: Tensor, wide: Tensor, noise: Noise, rows: slice | None = None) -> None:
    """target <- wide, rounded to bfloat16. `wide` (float32) is used up; both are rows `rows` of the weight.

    Numbers that bfloat16 has, infinities and NaN stay what they are. Weights of other dtypes are copied.
    """
    if target.dtype != torch.bfloat16 or not target.numel():
        target.copy_(wide)
        return
    wide = wide.float().contiguous()  # float64 has nothing to gain below the digits of float32
    flat = wide.view(wide.shape[0] if wide.ndim else 1, -1)
    by_row, by_column = noise.vectors(rows or slice(0, flat.shape[0]), wide.shape[1:], wide.device)
    for start in range(0, flat.shape[0], at_once := rows_at_once(flat)):
        part = flat[start : start + at_once]
        not_numbers = part.isnan()  # a payload of ones, such as CUDA's, would carry over into the sign
        drawn = crossed(by_row[start : start + at_once], by_column)
        part.view(torch.int32).add_(drawn).bitwise_and_(-65536)
        part.masked_fill_(not_numbers, torch.nan)
    target.copy_(wide)


def round_stack_(wide: Tensor, noises: Sequence[Noise], rows: slice) -> Tensor:
    """Rounds a contiguous stack of float32 weights (L, ...), or of their rows `rows`, in place: float32 numbers that
    bfloat16 has. All `noises` are of one shard."""
    stack = wide.view(len(noises), rows.stop - rows.start, -1)
    count = stack.shape[1]
    keys = torch.tensor([each.key for each in noises])
    if wide.device.type == "cuda":
        keys = keys.pin_memory()
    places = noises[0].places(rows, wide.shape[2:], wide.device)
    bits = hashed(keys.to(wide.device, non_blocking=True)[:, None], places.repeat(len(noises), 1))
    by_row, by_column = bits[:, :count], bits[:, count:]
    not_numbers = stack.isnan()  # a payload of ones, such as CUDA's, would carry over into the sign
    stack.view(torch.int32).add_(crossed(by_row, by_column)).bitwise_and_(-65536)
    stack.masked_fill_(not_numbers, torch.nan)
    return wide


def rows_at_once(matrix: Tensor) -> int:
    """Rows of a weight that are widened at a time."""
    return max(1, NUMBERS_AT_ONCE // max(1, matrix.shape[1:].numel()))


def rows_in_cache(matrix: Tensor, at_once: int | None = None) -> int:
    """Rows of a weight that are moved at a time where what moves them is made on the way."""
    return max(1, (at_once or NUMBERS_IN_CACHE) // max(1, matrix.shape[1:].numel()))
