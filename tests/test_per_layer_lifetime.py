"""How long hooks for updates inside the backward pass live, and what they refuse before any weight moves."""

import gc
import math
import weakref

import pytest
import torch
from per_layer_helpers import assert_alike, loss, setup, weights
from torch import nn

from peft_pretraining.optim import LowRankOptimizer, PerLayerUpdates


@pytest.mark.parametrize("ending", ["dropped", "closed", "with"])
def test_nothing_keeps_weights_and_optimizer_alive(ending):
    model, optimizer = setup()
    updates = PerLayerUpdates(optimizer)
    updates.begin_update(0)
    loss(model).backward()
    alive = [weakref.ref(each) for each in (model, *model.parameters(), optimizer, updates)]
    if ending == "closed":
        updates.close()
        updates.close()  # once more does nothing
    elif ending == "with":
        with updates:
            pass
    del model, optimizer, updates
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)


@pytest.mark.parametrize("closing", [True, False])
def test_ordinary_updates_go_on_afterwards(closing):
    """Closed, or no longer referred to; the optimizer counts the updates itself again."""
    model, optimizer = setup()
    other, reference = setup()
    updates = PerLayerUpdates(optimizer, early_first_bases=False)
    for step in range(2):
        updates.begin_update(step)
        loss(model, step).backward()
    if closing:
        updates.close()
    del updates
    if not closing:
        gc.collect()
    for step in range(6):
        if step >= 2:
            if not closing:
                optimizer.begin_update(step)
            loss(model, step).backward()
            assert all(param.grad is not None for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        loss(other, step).backward()
        reference.step()
        reference.zero_grad()
    assert_alike(model, other)
    assert int(optimizer.state[model[2].weight]["refreshes"]) == 2


# Refusals, before any weight moves.


@pytest.mark.parametrize(
    "scale", [lambda scaler, loss: scaler.scale(loss), lambda scaler, loss: scaler.scale([loss])[0]]
)
def test_scaled_losses_are_refused(scale):
    model, optimizer = setup()
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with PerLayerUpdates(optimizer) as updates:
        updates.begin_update(0)
        with pytest.raises(RuntimeError, match="GradScaler does not go with per-layer updates"):
            scale(scaler, loss(model)).backward()
        other, _ = setup()
        scale(scaler, loss(other)).backward()  # of weights that are nobody's business
        torch.amp.GradScaler("cpu", enabled=False).scale(loss(model).detach())
    assert all(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))
    scale(scaler, loss(model)).backward()
    scaler.step(optimizer)
    assert not any(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))


def test_a_second_backward_pass_in_one_update_is_refused():
    model, optimizer = setup()
    updates = PerLayerUpdates(optimizer)
    updates.begin_update(0)
    loss(model).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="has made update 0 already: call begin_update"):
        loss(model).backward()
    assert all(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))


def test_wrong_use_is_refused():
    _, optimizer = setup()
    for clip in (-1.0, math.nan):
        with pytest.raises(ValueError, match="clip must"):
            PerLayerUpdates(optimizer, clip=clip)
    updates = PerLayerUpdates(optimizer)
    with pytest.raises(RuntimeError, match="has per-layer updates already"):
        PerLayerUpdates(optimizer)
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"index must be at least 0 and below count, got {index} of {count}"):
            updates.begin_micro_batch(index, count)
    updates.close()
    PerLayerUpdates(optimizer).close()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(6, 4, sparse=True)
    updates = PerLayerUpdates(LowRankOptimizer([table.weight]))
    updates.begin_update(0)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        table(torch.tensor([1])).sum().backward()
