"""A backward pass that returns projected gradients: the updates are those of full gradients that are projected."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import helpers
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError
from peft_pretraining.models import compiled
from peft_pretraining.models.compute_dtype import compute_in
from peft_pretraining.nn.projected_linear import project_backward
from peft_pretraining.optim import LowRankOptimizer, PerLayerUpdates
from peft_pretraining.optim.model_groups import model_groups

RANDOM = {"rand_ratio": 0.4, "num_training_steps": 20}
KINDS = ("std", "reverse_std", "left", "right", "full")


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20, bias=False), nn.Tanh(), nn.Linear(20, 5, bias=False)]
    return nn.Sequential(*layers).double()


def optimizer_of(model, projected=("0.", "2.", "4."), rule="adamw", **settings):
    of_groups = {"rank": 3, "update_proj_gap": 4, "scale": 0.5, **settings}
    of_optimizer = {name: of_groups.pop(name) for name in ("refresh_accumulation",) if name in of_groups}
    groups = [{"params": [p for name, p in model.named_parameters() if not is_target(name, projected)]}]
    weights = [p for name, p in model.named_parameters() if is_target(name, projected)]
    return LowRankOptimizer(
        [*groups, {"params": weights, **of_groups}], rule=rule, lr=0.01, weight_decay=0.1, **of_optimizer
    )


def is_target(name, projected):
    return name.endswith("weight") and any(name.startswith(start) for start in projected)


def backward_pass(model, *seeds):
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(hash(seeds)), dtype=torch.float64)
    loss = (model(x) - x[:, :5].sin()).square().mean()
    loss.backward()
    return loss.item()


def losses(model, optimizer, updates=20, accumulation=1, **per_layer):
    """Of updates with clipping, as the training loop makes them; inside the backward pass with settings for that."""
    with PerLayerUpdates(optimizer, **per_layer) if per_layer else nullcontext():
        return losses_of(model, optimizer, updates, accumulation)


def losses_of(model, optimizer, updates, accumulation):
    found = []
    for step in range(updates):
        optimizer.begin_update(step)
        for extra in range(optimizer.wants_extra_batches()):
            for index in range(accumulation):
                optimizer.begin_micro_batch(index, accumulation)
                backward_pass(model, step, extra, index)
            optimizer.observe_gradients()
            optimizer.zero_grad()
        for index in range(accumulation):
            optimizer.begin_micro_batch(index, accumulation)
            found.append(backward_pass(model, step, index))
        norm = optimizer.grad_norm()
        optimizer.scale_((0.1 / (norm + 1e-6)).clamp(max=1))
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(found, dtype=torch.float64)


def assert_same_updates(rule="adamw", accumulation=1, per_layer=None, **settings):
    ordinary, projected, way = network(), network(), {"accumulation": accumulation, **(per_layer or {})}
    expected = losses(ordinary, optimizer_of(ordinary, rule=rule, **settings), **way)
    optimizer = optimizer_of(projected, rule=rule, **settings)
    assert project_backward(projected, optimizer) == {}
    found = losses(projected, optimizer, **way)
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(found, expected, **exact)
    torch.testing.assert_close(list(projected.parameters()), list(ordinary.parameters()), **exact)
    assert not any(weight.grad is not None for weight in optimizer.subspaces)


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "lion", "sgd"])
def test_the_updates_are_those_of_projected_gradients(rule):
    """Twenty of them, with five refreshes of every kind of basis."""
    for kind, accumulation in itertools.product(KINDS, (1, 3)):
        assert_same_updates(rule, accumulation, proj_type=kind)
    assert_same_updates(rule, **RANDOM)


def test_moments_in_8_bits_are_those_of_projected_gradients():
    assert_same_updates("adamw8bit")


@pytest.mark.parametrize("settings", [{}, RANDOM], ids=["svd", "random"])
def test_refreshes_may_be_spread_and_see_further_batches(settings):
    assert_same_updates(accumulation=3, **settings)
    assert_same_updates(stagger_refresh=True, **settings)
    assert_same_updates(refresh_accumulation=3, accumulation=2, **settings)


@pytest.mark.parametrize("settings", [{}, RANDOM, {**RANDOM, "rand_ratio": 0.0}], ids=["svd", "golore", "random"])
def test_updates_inside_the_backward_pass_take_what_it_returns(settings):
    for accumulation, early, kind in itertools.product((1, 3), (True, False), ("std", "full")):
        per_layer = {"clip": 0.05, "early_first_bases": early}
        assert_same_updates("sgd", accumulation, per_layer, proj_type=kind, **settings)


@pytest.mark.parametrize("kept", ["float32", "int8"])
def test_bases_are_read_as_they_are_kept(kept):
    assert_same_updates(basis_dtype=kept, **RANDOM)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("settings", [{}, {**RANDOM, "rand_ratio": 0.0}], ids=["svd", "random"])
def test_an_update_that_is_left_out_leaves_its_refresh_pending(settings, accumulation):
    model = network()
    optimizer = optimizer_of(model, **settings)
    project_backward(model, optimizer)
    losses(model, optimizer, updates=4)  # update 4 is to refresh
    weights, states = [
        [value.clone() for value in values]
        for values in (model.parameters(), itertools.chain(*(state.values() for state in optimizer.state.values())))
    ]
    optimizer.begin_update(4)
    for index in range(accumulation):
        optimizer.begin_micro_batch(index, accumulation)
        (backward_pass(model, 4), model[0].bias.grad.fill_(torch.nan))
    assert optimizer.grad_norm().isnan()
    optimizer.zero_grad()
    now = itertools.chain(*(state.values() for state in optimizer.state.values()))
    assert all(map(torch.equal, weights, model.parameters())) and all(map(torch.equal, states, now))
    optimizer.begin_update(5)
    backward_pass(model, 5)
    optimizer.step()
    assert {int(optimizer.state[weight]["last_refresh"]) for weight in optimizer.subspaces} == {5}


def test_a_gradient_that_is_not_finite_makes_no_basis():
    model = network()
    optimizer = optimizer_of(model)
    project_backward(model, optimizer)
    optimizer.begin_update(0)
    (model(torch.full((2, 12), torch.inf, dtype=torch.float64)).sum() * torch.nan).backward()
    assert not optimizer.grad_norm().isfinite()
    optimizer.zero_grad()
    assert not any(projected.changes_bases for projected in optimizer.projected.values())


def llama(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **settings)).to(dtype).train()


def llama_losses(model, projects, updates=9, **settings):
    groups = model_groups(model, ("attn", "mlp"), {"rank": 8, "update_proj_gap": 4, **settings})
    optimizer = LowRankOptimizer(groups, lr=0.01)
    if projects:
        assert project_backward(model, optimizer) == {}
    found = []
    for step in range(updates):
        optimizer.begin_update(step)
        ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_recomputed_layers_project_as_well():
    expected, model = llama_losses(llama(), False), llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(llama_losses(model, True), expected, rtol=0, atol=1e-12)


def test_compiled_layers_project_as_well(monkeypatch):
    """Refreshes that need G run eagerly, everything else by one graph."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    expected, model = llama_losses(llama(), False, **RANDOM), llama()
    compilation = compiled.compile_layers(model)
    torch.testing.assert_close(llama_losses(model, True, **RANDOM), expected, rtol=0, atol=1e-12)
    assert compilation.compilations == 1 and not compilation.failed


@pytest.mark.parametrize("kind", ["std", "full"])
def test_layers_that_cast_project_as_well(kind):
    """The last layer of an MLP, too, which makes its input again in the backward pass."""
    ordinary, projected = llama(), llama()
    for model in (ordinary, projected):
        compute_in(model, torch.float64)
    expected = llama_losses(ordinary, False, proj_type=kind)
    torch.testing.assert_close(llama_losses(projected, True, proj_type=kind), expected, rtol=0, atol=1e-12)


def test_activations_of_the_projected_side_are_not_kept():
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    optimizer = LowRankOptimizer([{"params": [model[0].weight], "rank": 4, "proj_type": "right", "update_proj_gap": 2}])
    project_backward(model, optimizer)
    x = torch.randn(32, 64, requires_grad=True)
    for step, rows in ((0, 64), (1, 4)):
        kept.clear()
        optimizer.begin_update(step)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x)
        own = [tensor for tensor in kept.values() if tensor.shape[0] == 32]
        assert [tuple(tensor.shape) for tensor in own] == [(32, rows)]
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_layers_that_cannot_project_keep_their_gradients():
    model = network()
    model.append(nn.Linear(5, 5, bias=False, dtype=torch.float64))
    model.append(nn.Linear(5, 5, bias=False, dtype=torch.float64))
    model[6].weight = model[5].weight
    model[0].forward = model[0].forward
    optimizer = optimizer_of(model, ("0.", "2.", "5."))
    reasons = project_backward(model, optimizer)
    assert sorted(reasons.values()) == ["a Linear is no plain linear layer", "several modules have it"]
    optimizer.begin_update(0)
    backward_pass(model, 0)
    assert [weight.grad is None for weight in optimizer.subspaces] == [False, True, False]
    optimizer.step()
    assert {int(optimizer.state[weight]["step"]) for weight in optimizer.subspaces} == {1}


def test_what_reads_full_gradients_goes_without(command):
    with pytest.raises(ConfigError, match="--projected_backward on: --clip_norm full needs"):
        cli.load(command(method="galore", rank=4, clip_norm="full", projected_backward="on"))
    with pytest.raises(ConfigError, match="--projected_backward on: method online_subspace_descent reads"):
        cli.load(command(method="online_subspace_descent", rank=4, projected_backward="on"))


def test_a_new_run_projects_and_an_older_one_goes_on_as_it_was(command, tmp_path):
    flags = {"method": "golore", "rank": 4, "update_proj_gap": 3, "rand_ratio": 0.5, "num_training_steps": 4}
    assert helpers.run(command(**flags)) == 0
    assert recorded(tmp_path / "run") == "on"
    assert helpers.run(command(**flags, save_dir=tmp_path / "off", projected_backward="off")) == 0
    assert (
        helpers.run([*command(**{**flags, "num_training_steps": 6}, save_dir=tmp_path / "off"), *helpers.RESUME]) == 0
    )
    assert recorded(tmp_path / "off") == "off"


def recorded(folder):
    return run_dir.read_run_config(folder)["settings"]["projected_backward"]
