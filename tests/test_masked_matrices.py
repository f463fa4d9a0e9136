"""Update rules of matrices made by rows, stacked and masked: all come to what one tensor after the other does."""

import pytest
import torch
from test_masked_updates import Loop, assert_same, pattern
from torch import nn

from peft_pretraining import optim
from peft_pretraining.optim.tensors import launching, rounding

SHAPES = ((6, 4), (6, 4), (4, 7), (6, 4), (9, 10))
KINDS = {
    "foam": lambda params, **own: optim.Foam(params, lr=0.05, **own),
    "foam, of means": lambda params, **own: optim.Foam(params, lr=0.05, second="square_of_mean", level=1, **own),
    "racs": lambda params, **own: optim.Racs(params, lr=0.5, **own),
    "scale": lambda params, **own: optim.Scale(params, lr=0.05, **own),
    "scale, head": lambda params, **own: optim.Scale(params, lr=0.05, role="head", **own),
    "scale, embedding": lambda params, **own: optim.Scale(params, lr=0.05, role="embedding", **own),
    "rmnp": lambda params, **own: optim.RMNP(params, lr=0.05, **own),
    "rmnp, no nesterov": lambda params, **own: optim.RMNP(params, lr=0.05, nesterov=False, **own),
    "adam_mini": lambda params, **own: optim.AdamMini(params, lr=0.05, **own),
    "adam_mini, one block": lambda params, **own: optim.AdamMini(params, lr=0.05, blocks="tensor", **own),
    "stable_spam": lambda params, **own: optim.StableSPAM(params, lr=0.05, gap=4, theta=0.5, **own),
}
VECTORS = ((5,), (5,), ())
"""Of rules that take parameters of any shape."""
each_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, dtype=torch.float64, **own):
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES + VECTORS if kind.split(",")[0] in ("adam_mini", "stable_spam") else SHAPES
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]
    return KINDS[kind](params, **{"weight_decay": 0.1, **own}), params


def trained(kind, dtype=torch.float64, **own):
    loop = Loop(*build(kind, dtype, **own), masked=False)
    for step in range(6):
        loop.update(step, broken=None)
    return loop


@each_kind
def test_blocks_of_rows_are_what_the_whole_is(monkeypatch, kind):
    whole = trained(kind)
    monkeypatch.setattr(rounding, "NUMBERS_IN_CACHE", 16)
    assert_same(whole, trained(kind), exact=False)


@each_kind
def test_stacks_are_what_single_ones_are(monkeypatch, kind):
    single = trained(kind)
    monkeypatch.setattr(launching, "ON_EVERY_DEVICE", True)
    assert_same(single, trained(kind), exact=False)


@each_kind
@pytest.mark.parametrize("seed", range(2))
def test_a_masked_update_is_the_one_that_the_host_decides_on(kind, seed):
    loops = [Loop(*build(kind), masked) for masked in (False, True)]
    assert all(loops[1].optimizer.objects(param).masks for param in loops[1].params)
    for step, broken in enumerate(pattern(seed, 10)):
        for loop in loops:
            loop.update(step, broken)
        loops[1].settle()
        assert_same(*loops, exact=False)


@pytest.mark.parametrize("settings", [{}, {"state_format": "weight"}, {"rounding": "stochastic"}], ids=str)
@each_kind
def test_rounded_weights_are_the_same_in_blocks(monkeypatch, kind, settings):
    """Rows that are widened, and moments that are kept in fewer digits."""
    whole = trained(kind, torch.bfloat16, **settings)
    monkeypatch.setattr(rounding, "NUMBERS_IN_CACHE", 16)
    for one, other in zip(whole.params, trained(kind, torch.bfloat16, **settings).params, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=0)
