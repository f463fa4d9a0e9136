"""What updates inside the backward pass hold: no second copy of bases and projected gradients in the first update."""

import math

import pytest
import torch
from per_layer_helpers import loss, setup, weights

from peft_pretraining.optim import PerLayerUpdates


def accumulate(updates, model, step, sizes, frozen=False):
    """One update of as many micro-batches as there are sizes, by which their losses are multiplied."""
    updates.begin_update(step, frozen)
    for index, size in enumerate(sizes):
        updates.begin_micro_batch(index, len(sizes))
        loss(model, 10 * step + index, size).backward()


def state_of(optimizer, model):
    return {key: value.clone() for key, value in optimizer.state[model[2].weight].items()}


def test_the_first_bases_exist_once():
    model, optimizer = setup("adamw")
    updates = PerLayerUpdates(optimizer)
    updates.begin_update(0)
    updates.begin_micro_batch(0, 2)
    loss(model).backward()
    (early,) = updates._early.values()
    assert early.new_bases is None and early.in_place
    assert early.low_rank_grad.numel() == 0  # the sum has it
    (side,) = optimizer.subspaces[model[2].weight].projection.sides
    basis = optimizer.state[model[2].weight][side].clone()
    assert basis.any()
    updates.begin_micro_batch(1, 2)
    loss(model, 1).backward()
    state = optimizer.state[model[2].weight]
    assert torch.equal(state[side], basis) and (int(state["refreshes"]), int(state["last_refresh"])) == (1, 0)


@pytest.mark.parametrize("how", ["not finite", "frozen", "broken off", "without gradients"])
def test_a_first_update_that_does_not_take_place_leaves_no_basis(how):
    """The basis is there before the update is; then everything goes on as if that had never been begun."""
    (model, optimizer), (other, reference) = setup("adamw"), setup("adamw")
    updates, expected = PerLayerUpdates(optimizer, clip=1.0), PerLayerUpdates(reference, clip=1.0)
    before, start = weights(model), state_of(optimizer, model)
    if how == "broken off":
        updates.begin_update(0)
        updates.begin_micro_batch(0, 2)
        loss(model).backward()
        updates.begin_update(1)
    elif how == "without gradients":  # in the end: those of the two micro-batches cancel
        updates.begin_update(0)
        for index, size in enumerate((1.0, -1.0)):
            updates.begin_micro_batch(index, 2)
            loss(model, 0, size).backward()
        updates.begin_update(1)
    else:
        accumulate(updates, model, 0, (1.0, math.nan if how == "not finite" else 1.0), how == "frozen")
    assert all(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))
    now = state_of(optimizer, model)
    assert now.keys() == start.keys() and all(torch.equal(now[key], start[key]) for key in start)
    for step in (1, 2):
        accumulate(updates, model, step, (1.0, 1.0))
        accumulate(expected, other, step, (1.0, 1.0))
    assert all(torch.equal(*pair) for pair in zip(weights(model), weights(other), strict=True))
    assert int(optimizer.state[model[2].weight]["last_refresh"]) == 1
