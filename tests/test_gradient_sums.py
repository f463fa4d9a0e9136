"""Sums over micro-batches in fewer bytes: how far from float32's, on average right, and the same whenever made."""

import pytest
import torch
from per_layer_helpers import loss, setup, weights

from peft_pretraining import rng
from peft_pretraining.optim import PerLayerUpdates, gradient_sums
from peft_pretraining.optim.gradient_sums import (
    GradientSums,
    Noise,
    keyed,
    places,
    random_bits,
    rounded_to_bfloat16_,
)


def parameter(dtype=torch.bfloat16):
    return torch.nn.Parameter(torch.zeros(256, 96, dtype=dtype))


def parts(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(256, 96, generator=generator).bfloat16() for _ in range(count)]


def summed(kind, given, param=None, seed=0, update=0):
    sums, param = GradientSums(kind, seed), param if param is not None else parameter()
    for index, part in enumerate(given):
        sums.add(param, part, Noise("weight", update, index) if sums.narrows(param) else None)
    return sums.total(param)


@pytest.mark.parametrize(
    "kind, limits", [("float32", (1e-6, 1e-6)), ("weight", (6e-3, 1.1e-2)), ("int8", (0.024, 0.045))]
)
def test_distance_from_exact_sums(kind, limits):
    for count, limit in zip((8, 32), limits, strict=True):
        given = parts(count)
        exact = sum(part.double() for part in given)
        found = summed(kind, given)
        assert found.dtype == torch.float32 and found.shape == exact.shape
        distance = float((found - exact).norm() / exact.norm())
        assert distance < limit and (kind == "float32" or distance > limit / 2)


@pytest.mark.parametrize("kind", ["weight", "int8"])
def test_sums_are_right_on_average(kind):
    """Of contributions, too, that are far below a step of the sum: to nearest they would change nothing."""
    given = [torch.full((256, 96), 8.0).bfloat16()] + [torch.full((256, 96), 2**-9).bfloat16()] * 16
    given[0][:, ::2] = -64.0  # so that 8.0 is not the largest of its block
    total = summed(kind, given)
    assert abs(float(total[:, 1::2].double().mean()) - 8 - 16 * 2**-9) < 0.02
    nearest = sum(given[1:], given[0])
    assert torch.equal(nearest, given[0])
    assert total[:, 1::2].double().mean() > 8.01 and total.unique().numel() > 2


def test_the_noise_has_a_place_and_a_time():
    given = parts(4)
    for kind in ("weight", "int8"):
        assert torch.equal(summed(kind, given), summed(kind, given))
        assert not torch.equal(summed(kind, given), summed(kind, given, seed=1))
        assert not torch.equal(summed(kind, given), summed(kind, given, update=1))


def test_lots_of_numbers_give_the_same_bits(monkeypatch):
    given, expected = parts(3), [summed(kind, parts(3)) for kind in ("weight", "int8")]
    monkeypatch.setattr(gradient_sums, "_NUMBERS_AT_ONCE", 1024)
    assert all(torch.equal(summed(kind, given), was) for kind, was in zip(("weight", "int8"), expected, strict=True))


def bits_of(count, key):
    return random_bits(count, *keyed(key, *places(256, torch.device("cpu"))))


def test_random_bits():
    bits = bits_of(2**16, 12345)
    assert bits.min() == 0 and bits.max() == 2**16 - 1
    assert bits.unique().numel() > 0.98 * (1 - 1 / torch.e) * 2**16  # as many as independent draws would give
    shares = [((bits >> place) & 1).float().mean() for place in range(16)]
    assert all(abs(share - 0.5) < 0.01 for share in shares)
    keys = [rng.derive_seed(0, "sum of weight", 0, micro_batch) for micro_batch in range(16)]
    others = [bits.roll(1), bits.roll(256), *(bits_of(2**16, key) for key in keys)]
    together = torch.corrcoef(torch.stack([bits, *others]).double()).fill_diagonal_(0)
    assert together.abs().max() < 0.02


def test_rounding_to_bfloat16():
    wide = torch.tensor([1.0, 1.0 + 2**-9, -1.0 - 2**-9, float("inf"), float("nan"), 0.0]).repeat_interleave(4096)
    found = rounded_to_bfloat16_(wide, bits_of(wide.numel(), 1)).bfloat16().view(6, 4096)
    assert found[0].eq(1).all() and found[3].isinf().all() and found[4].isnan().all() and found[5].eq(0).all()
    assert set(found[1].tolist()) == {1.0, 1.0 + 2**-7} and abs(float(found[1].float().mean()) - 1 - 2**-9) < 5e-4
    assert abs(float(found[2].float().mean()) + 1 + 2**-9) < 5e-4


def test_what_is_not_finite_reaches_the_sum():
    given = parts(3)
    given[1][5, 7] = float("nan")
    for kind in ("weight", "int8"):
        assert not summed(kind, given).isfinite().all()


@pytest.mark.parametrize("kind", ["weight", "int8"])
def test_whatever_has_more_digits_is_added_up_as_ever(kind):
    given = [part.double() for part in parts(3)]
    assert torch.equal(
        summed(kind, given, parameter(torch.float64)), summed("float32", given, parameter(torch.float64))
    )


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="sum_dtype must be one of float32, weight, int8, got 'int4'"):
        PerLayerUpdates(setup()[1], sum_dtype="int4")


# In updates inside the backward pass.


def trained(kind, count, rule="sgd"):
    model, optimizer = setup(rule, dtype=torch.bfloat16)
    start, held = weights(model), []
    with PerLayerUpdates(optimizer, sum_dtype=kind) as updates:
        for step in range(4):
            updates.begin_update(step)
            for index in range(count):
                updates.begin_micro_batch(index, count)
                (loss(model, 100 * step + index) / count).backward()
                held.append(sum(each.nbytes for each in (*updates._sums.values(), *updates._sums._scales.values())))
                held[-1] += sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    return start, weights(model), held


@pytest.mark.parametrize("kind, most", [("weight", 2 * (16 * 24 + 24 * 4)), ("int8", 2 * 16 * 24 + 24 * 4 + 4)])
def test_updates_follow_those_with_whole_sums(kind, most):
    """Also where nothing is added up: there the bits are the same."""
    start, expected, whole = trained("float32", 4)
    _, found, held = trained(kind, 4)
    assert (held[2], whole[2]) == (most, 2 * 16 * 24 + 4 * 24 * 4)  # before the last micro-batch
    for one, other, was in zip(found, expected, start, strict=True):
        assert 0 < (other - was).float().norm()
        assert (one - other).float().norm() < 0.2 * (other - was).float().norm()
    assert all(torch.equal(*pair) for pair in zip(trained(kind, 1)[1], trained("float32", 1)[1], strict=True))
