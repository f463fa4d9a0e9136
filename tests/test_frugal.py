"""FRUGAL: which part Adam is for, what the rest does, and restarts."""

import pytest
import torch
from projection_helpers import parameter, set_gradients

from peft_pretraining.optim import Frugal


def train(optimizer, weights, updates, start=0):
    for step in range(start, start + updates):
        set_gradients(weights, step)
        optimizer.step()


@pytest.mark.parametrize(("space", "dim"), [("columns", 1), ("rows", 0)])
def test_a_part_of_each_matrix_is_inside(space, dim):
    weight = parameter((8, 8))
    optimizer = Frugal([weight], lr=0.01, space=space, update_proj_gap=2)
    chosen = []
    for step in range(6):
        before = weight.detach().clone()
        train(optimizer, [weight], 1, step)
        moved = (before - weight.detach()).movedim(dim, 0)
        signs = (0.01 * weight.grad.sign()).movedim(dim, 0)
        outside = [torch.allclose(*pair, atol=1e-12, rtol=0) for pair in zip(moved, signs, strict=True)]
        if step % 2:  # in the first update of a part Adam's step is a sign, too
            chosen.append(tuple(index for index, is_outside in enumerate(outside) if not is_outside))
    assert all(len(part) == 2 for part in chosen) and len(set(chosen)) > 1


def test_adams_part_of_the_svd_is_the_span_of_the_top_vector():
    weight = parameter((6, 4))
    start, optimizer = weight.detach().clone(), Frugal([weight], lr=0.01, space="svd", free_scale=0.0)
    train(optimizer, [weight], 1)
    q = torch.linalg.svd(weight.grad)[2][:1]
    assert ((weight.detach() - start) @ (torch.eye(4, dtype=q.dtype) - q.T @ q)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "density", "dead"), [((6, 4), 1.0, None), ((4, 6), 1.0, None), ((8, 6), 0.3, 1), ((6, 8), 0.3, 0)]
)
def test_rounding_outside_the_svd_has_no_sign(shape, density, dead, dtype):
    """Nothing is outside of all directions, nor where the gradient is zero: there `sign` and `none` are the same."""
    weights = [parameter(shape, dtype=dtype), parameter(shape, dtype=dtype)]
    for weight, free in zip(weights, ("sign", "none"), strict=True):
        optimizer = Frugal([weight], lr=0.1, space="svd", density=density, free_rule=free, update_proj_gap=3)
        for step in range(5):
            set_gradients([weight], step)
            if dead is not None:
                weight.grad.select(dead, 2).zero_()
            optimizer.step()
    one, other = (weight.detach() if dead is None else weight.detach().select(dead, 2) for weight in weights)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
def test_what_is_outside(free):
    weights = [parameter((4, 4), seed) for seed in range(4)]
    starts = [weight.detach().clone() for weight in weights]
    optimizer = Frugal(weights, lr=0.01, density=0.5, free_rule=free, free_scale=0.5)
    train(optimizer, weights, 1)
    inside = ["exp_avg" in optimizer.state[weight] for weight in weights]
    assert sum(inside) == 2
    for weight, start, is_inside in zip(weights, starts, inside, strict=True):
        expected = {"sign": weight.grad.sign(), "sgd": weight.grad, "none": torch.zeros_like(start)}[free]
        if not is_inside:
            torch.testing.assert_close(start - weight.detach(), 0.005 * expected)


def test_descending_blocks_go_from_the_last_to_the_first():
    weights = [parameter((4, 4), seed) for seed in range(5)]
    optimizer = Frugal(weights, density=0.4, update_proj_gap=1, blocks="descending")
    seen = []
    for step in range(4):
        train(optimizer, weights, 1, step)
        seen.append({place for place, weight in enumerate(weights) if "exp_avg" in optimizer.state[weight]})
    assert seen == [{3, 4}, {1, 2}, {0, 4}, {2, 3}]


def test_a_choice_that_falls_on_a_skipped_update_is_made_in_the_next():
    weight = parameter((8, 8))
    optimizer = Frugal([weight], space="columns", update_proj_gap=2)
    for step in range(4):
        optimizer.begin_update(step)
        set_gradients([weight], step)
        if step != 2:
            optimizer.step()
    assert int(optimizer.state[weight]["choice"]) == 1 and int(optimizer.state[weight]["age"]) == 1


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("space", "layers", "space must be one of blocks, columns, rows, svd, got 'layers'"),
        ("density", 1.5, "density must be above 0 and at most 1, got 1.5"),
        ("free_rule", "adam", "free_rule must be one of sign, sgd, none, got 'adam'"),
        ("blocks", "ascending", "blocks must be one of random, descending, got 'ascending'"),
    ],
)
def test_what_makes_no_sense_is_refused(setting, value, said):
    with pytest.raises(ValueError, match=said):
        Frugal([parameter((4, 4))], **{setting: value})
