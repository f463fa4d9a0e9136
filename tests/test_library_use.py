"""The optimizer in other people's training loops: as any `torch.optim.Optimizer`, and under transformers' `Trainer`."""

import copy
import itertools
import logging
import math
import pickle
import re

import pytest
import torch
from helpers import PROJECT
from projection_helpers import RULES, build, matrix, parameter, set_gradients, through_a_file, train
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.methods import METHODS
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.basis.bases import PROJECTION_TYPES
from peft_pretraining.optim.tensors.projection import RIGHT

GOLORE = {"rand_ratio": 0.5, "num_training_steps": 10}
PROJECTIONS = [
    *(("std", {}), ("random", {}), ("std", GOLORE), ("left", {"svd_method": "randomized"})),
    *((kind, {}) for kind in PROJECTION_TYPES if "continuous" in kind),
]


def test_the_readmes_example():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 50))
    regular = [model[0].weight, model[1].bias, model[2].bias]
    projected = [model[1].weight, model[2].weight]
    opt = LowRankOptimizer([{"params": regular}, {"params": projected, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}], rule="adamw", lr=0.01, weight_decay=0.01)  # noqa: E501  # fmt: skip
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.state[projected[0]][RIGHT].shape == (32, 32)  # a rank beyond the weight's becomes the weight's
    tokens, losses = torch.arange(50), []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(tokens), (tokens + 1) % 50)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_librarys_page():
    """Its examples are run as they stand, and name every method that brings an optimizer along."""
    page = (PROJECT / "docs" / "library.md").read_text()
    loop, constructors = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    names = {"model": tiny_llama(), "batches": [{"input_ids": tokens, "labels": tokens}] * 8}
    losses = [names["model"](**names["batches"][0]).loss.item()]
    exec(loop, names)
    losses.append(names["model"](**names["batches"][0]).loss.item())
    assert losses[1] < losses[0] - 0.005
    exec(constructors, names)
    assert {spec.name for spec in METHODS.values() if spec.library} | {"galore"} == set(names["optimizers"])
    for name, optimizer in names["optimizers"].items():
        optimizer.zero_grad()
        names["model"](**names["batches"][0]).loss.backward()
        before = [param.detach().clone() for param in names["model"].parameters()]
        optimizer.step()
        optimizer.step()  # SOAP's first update fills its Gram matrices alone
        moved = zip(before, names["model"].parameters(), strict=True)
        assert all(not torch.equal(*each) and bool(each[1].isfinite().all()) for each in moved), name


def test_what_differs_from_torch():
    """The formulas of the library's page: ε before the bias correction, the decay after the step."""
    rate, decay, eps, (beta1, beta2) = 0.1, 0.2, 1e-2, (0.9, 0.999)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    optimizer = LowRankOptimizer([{"params": [weight]}], rule="adamw", lr=rate, weight_decay=decay, eps=eps)
    expected, first, second = weight.detach().clone(), torch.zeros(6, 4).double(), torch.zeros(6, 4).double()
    for k in range(1, 5):
        weight.grad = grad = torch.randn(6, 4, dtype=torch.float64)
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad.square()
        corrected = (second / (1 - beta2**k)).sqrt() + eps / (1 - beta2**k) ** 0.5
        expected = (1 - rate * decay) * (expected - rate * first / (1 - beta1**k) / corrected)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-9)  # the kernel's count is float32


def tiny_llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **shape))


def plain(value):
    """Whether nothing but tensors, numbers, strings and None is inside."""
    if isinstance(value, dict):
        return all(plain(key) and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or type(value) in (torch.Tensor, int, float, str, bool)


def resumable(name, weights, proj_type, group):
    optimizer = build(weights[0], weights[2:], proj_type=proj_type, **group, **RULES[name])
    other = {"rank": 3, "update_proj_gap": 3, "proj_type": "full", "stagger_refresh": True}
    optimizer.add_param_group({"params": [weights[1]], **other})
    return optimizer


def updates(optimizer, weights, first, last):
    """With a rate that changes, as a scheduler's does."""
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        train(optimizer, weights, step, step + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("proj_type, group", PROJECTIONS)
def test_state_dict_resumes_bit_for_bit(name, proj_type, group, dtype):
    """Just before a refresh, at it and just after: they are at 4 and 8, GoLore's second kind of basis from 5 on."""
    weights = [parameter(shape, seed, dtype) for seed, shape in enumerate(((6, 5), (4, 7), (5,), (3, 4)))]
    optimizer, saved = resumable(name, weights, proj_type, group), []
    for step in range(9):
        if step in (3, 4, 5):
            assert plain(optimizer.state_dict())
            saved.append((step, copy.deepcopy(weights), through_a_file(optimizer.state_dict())))
        updates(optimizer, weights, step, step + 1)
    for step, restored, state in saved:
        fresh = resumable(name, restored, proj_type, group)
        fresh.load_state_dict(state)
        updates(fresh, restored, step, 9)
        for one, two in zip(weights, restored, strict=True):
            assert torch.equal(one, two)
            for key, value in optimizer.state[one].items():
                assert fresh.state[two][key].dtype == value.dtype and torch.equal(fresh.state[two][key], value), key


@pytest.mark.parametrize("changed", [{"rank": 3}, {"proj_type": "full"}, {"proj_type": "left"}, {"rule": "lion"},
                                     {"proj_type": "continuous"}, {"rule": "adamw8bit"}])  # fmt: skip
def test_a_state_of_other_settings_is_refused(changed):
    weight = parameter((6, 5), dtype=torch.float32)
    other, optimizer = build(parameter((6, 5), dtype=torch.float32), **changed), build(weight)
    train(optimizer, [weight], 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state of another rank, proj_type or rule"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]  # and nothing of it was taken over
    assert all(torch.equal(value, after["state"][0][key]) for key, value in before["state"][0].items())


def test_loading_forgets_what_was_projected():
    weight, plain_weight = parameter((6, 5)), parameter((6, 5))
    optimizer, reference = build(weight), build(plain_weight)
    start = copy.deepcopy(optimizer.state_dict())
    weight.grad = matrix((6, 5), 77)
    optimizer.project_gradients()
    optimizer.load_state_dict(start)
    train(optimizer, [weight], 0, 2)
    train(reference, [plain_weight], 0, 2)
    assert torch.equal(weight, plain_weight)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("proj_type", ["std", "full", "continuous"])
def test_optimizers_can_be_copied_with_their_weights(copied, proj_type):
    """As torch's can, for a search over rates or a look ahead."""
    weight, bias = parameter((6, 5)), parameter((5,))
    optimizer = build(weight, [bias], proj_type=proj_type)
    train(optimizer, [weight, bias], 0, 3)
    twin, weights = copied((optimizer, [weight, bias]))
    train(optimizer, [weight, bias], 3, 6)
    train(twin, weights, 3, 6)
    assert torch.equal(weights[0], weight) and torch.equal(weights[1], bias)


def test_names_decide_on_random_bases():
    """Not the place in the optimizer, which sharding or another order of layers may change. Without names it does."""
    bases = []
    for order in (("a", "b"), ("b", "a")):
        weights = {name: parameter((6, 5)) for name in "ab"}
        group = {"rank": 2, "rand_ratio": 0.0}
        optimizer = LowRankOptimizer([{"params": [(name, weights[name]) for name in order], **group}], seed=3)
        train(optimizer, list(weights.values()), 0, 1)
        bases.append([optimizer.state[weights[name]][RIGHT] for name in "ab"])
    assert torch.equal(bases[0][0], bases[1][0]) and torch.equal(bases[0][1], bases[1][1])
    assert not torch.allclose(bases[0][0], bases[0][1])
    weights = [parameter((6, 5)) for _ in range(3)]
    optimizers = [
        build(weights[0], rand_ratio=0.0, seed=3),
        LowRankOptimizer([{"params": weights[1:], **group}], seed=4),
    ]
    for optimizer, own in zip(optimizers, (weights[:1], weights[1:]), strict=True):
        train(optimizer, own, 0, 1)
    positional = [
        optimizers[0].state[weights[0]][RIGHT],
        *(optimizers[1].state[weight][RIGHT] for weight in weights[1:]),
    ]
    for one, two in itertools.combinations(positional, 2):  # another seed, and another position
        assert not torch.allclose(one, two)


def test_a_group_that_is_added_later_trains_too():
    weight, late = parameter((6, 5)), parameter((7, 4))
    optimizer = build(weight)
    train(optimizer, [weight], 0, 2)
    optimizer.add_param_group({"params": [late], "rank": 2, "proj_type": "right", "lr": 0.5, "update_proj_gap": 3})
    assert optimizer.state[late][RIGHT].shape == (2, 4) and optimizer.param_groups[1]["scale"] == 1.0
    before = late.detach().clone()
    train(optimizer, [weight, late], 2, 4)
    assert int(optimizer.state[late]["refreshes"]) == 1 and (late - before).abs().max() > 0.1


def test_a_group_that_is_refused_leaves_nothing_behind():
    weight = parameter((6, 5))
    optimizer = build(weight, update_proj_gap=2, stagger_refresh=True)
    with pytest.raises(ValueError, match="must be a matrix"):
        optimizer.add_param_group({"params": [parameter((4, 4)), parameter((5,))], "rank": 2})
    assert len(optimizer.param_groups) == len(optimizer.state) == len(optimizer.subspaces) == 1
    before = copy.deepcopy(optimizer.state_dict())
    fresh = build(parameter((6, 5)), update_proj_gap=2, stagger_refresh=True)
    fresh.load_state_dict(before)


def test_closures_and_gradients_that_are_missing():
    weight = parameter((6, 5))
    optimizer = build(weight)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    before = weight.detach().clone()
    optimizer.zero_grad()
    assert optimizer.step() is None
    assert torch.equal(before, weight)


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_base_rate_of_online_subspace_descent(scheduled):
    """A scheduler's `initial_lr`, else the rate at construction. With warm-up the group's rate starts far below it."""
    weight = parameter((6, 5))
    optimizer = build(weight, rule="sgd", proj_type="continuous_sgd", lr=0.02)
    if scheduled:
        optimizer.param_groups[0]["lr"] = 0.08
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25 + step / 4)
        assert optimizer.param_groups[0]["initial_lr"] == 0.08 and optimizer.param_groups[0]["lr"] == 0.02
    train(optimizer, [weight], 0, 1)
    before = optimizer.state[weight][RIGHT].clone()
    set_gradients([weight], 1)
    unit = weight.grad / weight.grad.norm()
    optimizer.step()
    error = unit @ before.T @ before - unit
    gradient = 2 * (before @ error.T @ unit + before @ unit.T @ error)
    share = 0.25 if scheduled else 1.0
    torch.testing.assert_close(optimizer.state[weight][RIGHT] - before, -share / 4 * gradient)
    if scheduled:
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.04
        fresh = build(parameter((6, 5)), rule="sgd", proj_type="continuous_sgd", lr=0.5)
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
        assert fresh.param_groups[0]["initial_lr"] == 0.08


@pytest.mark.parametrize("make", [
    lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
    lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
])  # fmt: skip
def test_torchs_schedulers(make):
    weight = parameter((6, 5))
    optimizer = build(weight, betas=(0.9, 0.999))
    scheduler, rates = make(optimizer), []
    for step in range(6):
        train(optimizer, [weight], step, step + 1)
        rates.append(optimizer.param_groups[0]["lr"])
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    assert len(set(rates)) > 2 and weight.isfinite().all()


@pytest.mark.parametrize("proj_type", ["std", "continuous"])
def test_grad_scaler_skips_infinite_steps(proj_type, caplog):
    """With the refresh at the next step, as if the skipped one had not been; the optimizer does not even see it."""
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    weight, reference = parameter((6, 5), dtype=torch.float32), parameter((6, 5), dtype=torch.float32)
    optimizer, plain_optimizer = build(weight, proj_type=proj_type), build(reference, proj_type=proj_type)
    train(plain_optimizer, [reference], 0, 6)
    with caplog.at_level(logging.WARNING):
        for step in [0, 1, 2, 3, None, 4, 5]:
            optimizer.zero_grad()
            direction = matrix((6, 5), 1 + 100 * (step or 0), torch.float32)
            scaler.scale((weight * direction).sum() * (math.inf if step is None else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 2.0**9 and not caplog.text
    assert int(optimizer.state[weight]["step"]) == 6
    assert torch.equal(weight, reference)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rule": "adamax"}, "rule must be one of adamw, adamw8bit, adafactor, lion, sgd"),
        ({"lr": -1.0}, "lr must not be negative"),
        ({"eps": -1e-8}, "eps must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"proj_type": "up"}, "proj_type must be one of std, reverse_std"),
        ({"svd_method": "lanczos"}, "svd_method must be one of exact, gram, randomized"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"update_proj_gap": -1}, "update_proj_gap must be at least 0, got -1"),
        ({"rand_ratio": 0.5, "proj_type": "continuous"}, "rand_ratio .* goes with proj_type"),
        ({"rand_ratio": 0.5, "proj_type": "random"}, "rand_ratio .* goes with proj_type"),
        ({"rand_ratio": 0.5}, "needs num_training_steps"),
        ({"proj_type": "continuous", "update_proj_gap": 0}, "update_proj_gap must not be 0"),
    ],
)
def test_wrong_use_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(parameter((6, 5)), **changes)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_only_matrices_can_be_projected(shape):
    with pytest.raises(ValueError, match=r"must be a matrix, got 0.0 of shape"):
        build(parameter(shape))
