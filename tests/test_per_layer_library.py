"""Updates inside the backward pass in other people's loops: what joins, what is left over, what does not take place."""

import copy

import pytest
import torch
from per_layer_helpers import assert_alike, loss, setup, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_pretraining.optim import PerLayerUpdates


def ordinary(model, optimizer, steps, backward):
    for step in steps:
        optimizer.begin_update(step)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def test_a_frozen_parameter_takes_part_once_it_is_trained():
    model, optimizer = setup("adamw")
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    updates = PerLayerUpdates(optimizer)
    updates.begin_update(0)
    loss(model).backward()
    assert torch.equal(model[0].weight, before) and int(optimizer.state[model[2].weight]["step"]) == 1
    model[0].weight.requires_grad_(True)
    updates.begin_update(1)
    loss(model).backward()
    assert not torch.equal(model[0].weight, before) and model[0].weight.grad is None


@pytest.mark.parametrize("group", [{}, {"rank": 2}])
def test_a_group_that_joins_moves(group):
    model, optimizer = setup()
    updates = PerLayerUpdates(optimizer)
    updates.begin_update(0)
    late = nn.Linear(8, 8, bias=False)
    before = late.weight.detach().clone()
    optimizer.add_param_group({"params": [late.weight], **group})
    late(model(torch.ones(2, 16))).sum().backward()
    assert not torch.equal(late.weight, before) and late.weight.grad is None


def test_settings_of_a_loaded_state_hold():
    """Loading puts other groups in the place of those that were there."""
    model, optimizer = setup()
    updates = PerLayerUpdates(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 0.0
    optimizer.load_state_dict(saved)
    before = weights(model)
    updates.begin_update(0)
    loss(model).backward()
    assert all(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("kind", ["projected", "regular"])
def test_a_parameter_that_only_early_micro_batches_use(kind, early, reentrant):
    """It moves by the mean over all micro-batches, as in an ordinary update, and its gradients do not pile up. Bases of
    full rank, which leave SGD as it is, come from one micro-batch as well as from all."""

    def expert_of(model):
        expert = nn.Linear(24, 24, bias=False)
        with torch.no_grad():
            expert.weight.copy_(torch.randn(24, 24, generator=torch.Generator().manual_seed(5)))
        return expert

    def run(layer, x):
        return layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)

    def micro_batch(model, expert, step, index):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(10 * step + index)).requires_grad_()
        hidden = run(model[0], x).tanh()
        hidden = run(expert, hidden) if index == 0 else hidden
        (run(model[2], hidden).square().mean() / 2).backward()

    runs = []
    for per_layer in (True, False):
        model, optimizer = setup(rank=8)
        expert = expert_of(model)
        settings = {"rank": 24, "update_proj_gap": 2} if kind == "projected" else {}
        optimizer.add_param_group({"params": [expert.weight], **settings})
        updates = PerLayerUpdates(optimizer, early_first_bases=early) if per_layer else None
        for step in range(4):
            optimizer.begin_update(step)
            if updates:
                updates.begin_update(step)
            for index in range(2):
                if updates:
                    updates.begin_micro_batch(index, 2)
                micro_batch(model, expert, step, index)
            if not updates or reentrant:  # within reentrant passes nobody knows which one is the last
                optimizer.step()
            if updates:
                assert expert.weight.grad is None and not updates._sums and not updates._kept
                assert len(updates._squared_norms) == 3
            optimizer.zero_grad()
        runs.append((expert.weight.detach().clone(), int(optimizer.state[expert.weight]["step"])))
    assert runs[0][1] == runs[1][1] == 4
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-5, rtol=1e-4)


def test_an_update_that_broke_off_leaves_nothing():
    model, optimizer = setup()
    other, reference = setup()
    updates, others = PerLayerUpdates(optimizer), PerLayerUpdates(reference)
    updates.begin_update(0)
    updates.begin_micro_batch(0, 2)
    loss(model, 7).backward()
    for its_model, its in ((model, updates), (other, others)):
        its.begin_update(0)
        for index in range(2):
            its.begin_micro_batch(index, 2)
            loss(its_model, index, 0.5).backward()
    assert_alike(model, other)


# Updates without gradients, and without a beginning.


def test_without_begin_update_state_stays_bounded():
    """Every parameter counts its own updates, as with an ordinary step."""
    model, optimizer = setup()
    other, reference = setup()
    updates = PerLayerUpdates(optimizer)
    for step in range(7):
        loss(model, step).backward()
        loss(other, step).backward()
        reference.step()
        reference.zero_grad()
    assert len(updates._squared_norms) == 2
    assert_alike(model, other)
    assert int(optimizer.state[model[2].weight]["refreshes"]) == 3


def test_the_norm_of_nothing_is_zero():
    _, optimizer = setup()
    updates = PerLayerUpdates(optimizer)
    assert updates.grad_norm() == 0
    updates.begin_update(0)
    assert updates.grad_norm() == 0 and optimizer.grad_norm() == 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_update_without_any_target_does_not_take_place(step, count):
    """Its gradients are zeros. With momentum and decay weights would move, and the count with them."""
    model, optimizer = setup("adamw")
    updates = PerLayerUpdates(optimizer, clip=1.0)
    for done in range(step):
        updates.begin_update(done)
        loss(model, done).backward()
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    updates.begin_update(step)
    for index in range(count):
        updates.begin_micro_batch(index, count)
        loss(model, step, 0.0).backward()
    assert updates.grad_norm() == 0
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))
    for index, its in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][key]) for key, value in its.items())
    updates.begin_update(step + 1)
    updates.begin_micro_batch(0, 1)
    loss(model, step).backward()
    assert not any(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))


def test_zeros_beside_other_gradients_are_an_ordinary_update():
    """The layer below a head of zeros: it decays, and its momentum goes on."""
    models = []
    for per_layer in (True, False):
        model, optimizer = setup("adamw")
        nn.init.zeros_(model[2].weight)
        if per_layer:
            updates = PerLayerUpdates(optimizer, early_first_bases=False)
            for step in range(4):
                updates.begin_update(step)
                loss(model, step).backward()
        else:
            ordinary(model, optimizer, range(4), lambda model, step: loss(model, step).backward())
        assert int(optimizer.state[model[0].weight]["step"]) == 4
        models.append(model)
    assert_alike(*models)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_gradients_whose_norm_leaves_float32_are_updates(size):
    """Neither zero nor infinite, although their squares are."""
    model, optimizer = setup(lr=0.1 / size)
    before = weights(model)
    updates = PerLayerUpdates(optimizer)
    updates.begin_update(0)
    loss(model, 0, size).backward()
    assert not any(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))
    assert all(param.isfinite().all() for param in model.parameters())
