"""Stochastic rounding: unbiased, independent, exact where nothing is to be rounded, and the same for every layout."""

import pytest
import torch

from peft_pretraining import rng
from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.tensors import rounding
from peft_pretraining.optim.tensors.rounding import Noise, round_stochastically

BELOW, ABOVE = 1.0, 1.0 + 2.0**-7
"""Neighbours in bfloat16."""


def rounded(wide, noise=None, **where):
    target = torch.empty(wide.shape, dtype=torch.bfloat16)
    round_stochastically(target, wide.clone(), noise or Noise(0, "weight", 0), **where)
    return target


def ups(share, noise=None, shape=(400, 250)):
    """Where numbers that lie `share` of the way up to the next one arrive there."""
    result = rounded(torch.full(shape, BELOW + share * (ABOVE - BELOW)), noise)
    assert set(result.unique().tolist()) <= {BELOW, ABOVE}
    return result == ABOVE


@pytest.mark.parametrize("share", [1 / 256, 0.1, 0.25, 0.5, 0.9, 255 / 256])
def test_the_mean_is_kept(share):
    """Over elements, and over the updates of one element: within five standard errors."""
    for drawn in (ups(share), torch.stack([ups(share, Noise(3, "w", step), (5, 8)) for step in range(1000)])):
        error = (share * (1 - share) / drawn.numel()) ** 0.5
        assert abs(drawn.double().mean() - share) < 5 * error
    rows, columns = ups(share).double().mean(1), ups(share).double().mean(0)
    for means, count in ((rows, 250), (columns, 400)):  # no row and no column is special
        assert (means - share).abs().max() < 5.5 * (share * (1 - share) / count) ** 0.5 + 1 / count


def test_small_steps_arrive_on_average():
    """A thousand steps of 1/80 of the distance to the next number, which rounding to nearest would lose."""
    weight = torch.ones(2000, dtype=torch.bfloat16)
    for step in range(1000):
        round_stochastically(weight, weight.float() + 1e-4, Noise(0, "weight", step))
    error = (1000 * 1e-4 * 2**-7 / 2000) ** 0.5  # each step's variance is at most its size times the distance
    assert abs(weight.double().mean() - 1.1) < 5 * error


def test_elements_updates_seeds_and_names_are_not_correlated():
    first = ups(0.5).double() * 2 - 1
    others = [
        ups(0.5, noise).double() * 2 - 1 for noise in (Noise(0, "weight", 1), Noise(1, "weight", 0), Noise(0, "v", 0))
    ]
    lagged = [first.roll(1, 0), first.roll(1, 1), first.roll((1, 1), (0, 1)), first.roll(2, 1), first.flip(0)]
    for other in others + lagged:
        assert abs((first * other).mean()) < 5 / first.numel() ** 0.5
    # The four corners of rectangles, which a mere sum of row and column noise would tie together.
    corners = first[:-1, :-1] * first[1:, :-1] * first[:-1, 1:] * first[1:, 1:]
    assert abs(corners.mean()) < 5 / corners.numel() ** 0.5


def test_the_noise_is_even_over_all_sixteen_bits():
    device = torch.device("cpu")
    noise = Noise(0, "weight", 0)
    drawn = rounding.crossed(*noise.vectors(slice(0, 1024), torch.Size((1024,)), device))
    assert drawn.min() >= 0 and drawn.max() < 2**16
    counts = torch.bincount(drawn.flatten() // 256, minlength=256).double()
    expected = drawn.numel() / 256
    assert ((counts - expected).square().sum() / expected - 255) < 5 * (2 * 255) ** 0.5  # chi-squared
    low = torch.bincount(drawn.flatten() % 256, minlength=256).double()
    assert ((low - expected).square().sum() / expected - 255) < 5 * (2 * 255) ** 0.5


def test_what_bfloat16_has_stays():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    for step in range(3):
        result = rounded(every.float(), Noise(0, "weight", step))
        numbers = ~every.isnan()
        assert torch.equal(result.view(torch.int16)[numbers], every.view(torch.int16)[numbers])
        assert result.isnan().equal(every.isnan())


def test_every_kind_of_nan_stays_one():
    """CUDA's has ones in all of its digits; one of which only the last bits are set would become infinite."""
    bits = [0x7FFFFFFF, 0x7F800001, -1, -(2**31) + 0x7F800001, 0x7FC00000]
    wide = torch.tensor(bits * 50, dtype=torch.int32).view(torch.float32)
    assert rounded(wide).isnan().all()
    infinite = torch.tensor([torch.inf, -torch.inf] * 50)
    assert torch.equal(rounded(infinite).float(), infinite)


@pytest.mark.parametrize("shape", [(12,), (12, 10), (12, 6, 4), (12, 1), (1, 12)])
def test_parts_are_rounded_as_the_whole_is(shape):
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = rounded(wide)
    for dim, length in enumerate(shape):
        for cut in (0, 1, length // 2, length):
            for offset, size in ((0, cut), (cut, length - cut)):
                shard = ShardInfo(torch.Size(shape), dim, offset, size)
                part = rounded(wide.narrow(dim, offset, size), Noise(0, "weight", 0, shard))
                assert torch.equal(part, whole.narrow(dim, offset, size)), (dim, offset, size)
                if shape[0] > 3 and dim and size:  # a block of rows of a part
                    rows = slice(1, 3)
                    block = wide.narrow(dim, offset, size)[rows]
                    assert torch.equal(rounded(block, Noise(0, "weight", 0, shard), rows=rows), part[rows])


def test_blocks_of_rows_change_nothing(monkeypatch):
    wide = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    whole = rounded(wide)
    for numbers in (1, 11, 50, 200):
        monkeypatch.setattr(rounding, "NUMBERS_AT_ONCE", numbers)
        assert torch.equal(rounded(wide), whole)
    assert torch.equal(rounded(wide.T.contiguous().T), whole)  # however it lies in memory
    target = torch.empty(11, 37, dtype=torch.bfloat16).T
    round_stochastically(target, wide.clone(), Noise(0, "weight", 0))
    assert torch.equal(target, whole)


def in_whole_numbers(key, index):
    """The upper half of SplitMix64's answer."""
    x = ((index + 1) * 0x9E3779B97F4A7C15 % 2**64) ^ key
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * multiplier % 2**64
    return x >> 32


def test_the_noise_is_what_its_formula_says():
    """A run that is resumed with a later version, or on another device, goes on as it would have."""
    noise = Noise(42, "model.layers.0.mlp.up_proj.weight", 7)
    key = rng.derive_seed(42, "rounding of model.layers.0.mlp.up_proj.weight", 7)
    device = torch.device("cpu")
    drawn = rounding.crossed(*noise.vectors(slice(2, 6), torch.Size((5,)), device))
    for row in range(4):
        for column in range(5):
            x = (in_whole_numbers(key, row + 2) + in_whole_numbers(key, 2**32 + column)) * 0x2C1B3C6D % 2**32
            sign = (2**15 - 1) << 17 if x >> 31 else 0  # the shift carries it along
            x = (x ^ (x >> 15) ^ sign) * 0x297A2D39 % 2**32
            assert int(drawn[row, column]) == x >> 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_are_rounded_to_nearest(dtype):
    wide = torch.randn(5, 3, dtype=torch.float64)
    target = torch.empty(5, 3, dtype=dtype)
    round_stochastically(target, wide.clone(), Noise(0, "weight", 0))
    assert torch.equal(target, wide.to(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0)])
def test_scalars_and_empty_parts(shape):
    assert rounded(torch.full(shape, 1.5)).shape == shape
