"""Parameter groups that each choose their own rule, basis, lift and state format, and gradients' affairs."""

import copy

import pytest
import torch
from conftest import write_model
from optimizer_kinds import KINDS, parameters, values
from projection_helpers import RULES, build, matrix, parameter, set_gradients, through_a_file, train
from torch import nn

from peft_pretraining.optim import LowRankOptimizer, StateTensor, UpdateRule, moving
from peft_pretraining.optim.basis.bases import RandomBasis, SVDBasis
from peft_pretraining.optim.model_groups import role_settings, roles_of, split_by_role
from peft_pretraining.optim.rules.lifts import Lift, ProjectBack
from peft_pretraining.optim.rules.update_rules import AdamW8bit
from peft_pretraining.optim.tensors.projection import RIGHT


def copies(weights):
    return [nn.Parameter(weight.detach().clone()) for weight in weights]


# torch's AdamW.


def torchs(params, **settings):
    return torch.optim.AdamW(params, fused=True, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)])
def test_torch_adamw_has_torchs_bits(dtype, rate):
    """Weights, moments and counts, with a rate that changes and a parameter that has no gradient at times."""
    ours = [parameter((6, 5), 0, dtype), parameter((7,), 1, dtype), parameter((), 2, dtype)]
    theirs = copies(ours)
    settings = {"lr": rate, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = LowRankOptimizer(ours, rule="torch_adamw", **settings)
    reference = torchs(theirs, **settings)
    for step in range(6):
        for params, each in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, step)
            if step in (1, 4):
                params[1].grad = None
            each.param_groups[0]["lr"] = rate * (step + 1)
            each.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            state, expected = optimizer.state[one], reference.state[other]
            assert all(torch.equal(state[key], value) for key, value in expected.items())
            assert {key: value.dtype for key, value in state.items()} == {
                key: value.dtype for key, value in expected.items()
            }


def test_a_state_of_torchs_adamw_goes_on():
    theirs = [parameter((6, 5), 0), parameter((7,), 1)]
    reference = torchs(theirs, lr=0.01, weight_decay=0.1)
    train(reference, theirs, 0, 3)
    ours = copies(theirs)
    optimizer = LowRankOptimizer(ours, rule="torch_adamw", lr=1.0)
    optimizer.load_state_dict(through_a_file(reference.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.param_groups[0]["rule"] == "torch_adamw"
    train(reference, theirs, 3, 6)
    train(optimizer, ours, 3, 6)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("begun", [False, True])
def test_torch_adamw_leaves_an_update_out_without_a_look_at_the_device(begun, monkeypatch):
    weights = [parameter((6, 5), 0), parameter((7,), 1)]
    optimizer = LowRankOptimizer(weights, rule="torch_adamw", lr=0.01, weight_decay=0.1)
    train(optimizer, weights, 0, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"]), values(weights)
    set_gradients(weights, 2)
    if begun:
        optimizer.begin_update(2)
        optimizer.found_inf = torch.ones(())
    else:
        weights[0].grad[0, 0] = float("nan")
    with monkeypatch.context() as patch:
        for name in ("item", "__bool__", "__float__", "tolist"):
            patch.setattr(torch.Tensor, name, lambda tensor: pytest.fail("read back from the device"))
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before[1], weights, strict=True))
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[0][index][key]) for key, value in state.items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0].rule != "vector"])
def test_found_inf_and_grad_scale(kind):
    """An update that is left out leaves no trace, and scaled gradients do what unscaled ones would.

    VectorAdamW takes gradients as they are.
    """
    params, others = parameters(), parameters()
    scaled, plain = kind(params), kind(others)
    for step in range(4):
        set_gradients(others, step)
        plain.step()
        if step == 2:
            before = copy.deepcopy(scaled.state_dict()), values(params)
            set_gradients(params, step)
            scaled.found_inf = torch.ones(())
            scaled.step()
            assert all(torch.equal(*pair) for pair in zip(before[1], params, strict=True))
            for index, state in scaled.state_dict()["state"].items():
                assert all(torch.equal(value, before[0]["state"][index][key]) for key, value in state.items())
        set_gradients(params, step)
        for param in params:
            param.grad *= 1024
        scaled.found_inf, scaled.grad_scale = torch.zeros(()), torch.tensor(1024.0)
        scaled.step()
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


# Groups that differ.


def test_groups_with_objects_of_their_own_are_optimizers_of_their_own():
    shapes = [(6, 5), (5, 6), (7, 4), (5,)]
    together, apart = ([parameter(shape, seed) for seed, shape in enumerate(shapes)] for _ in range(2))
    groups = [
        {"rule": "adamw", "rank": 2, "update_proj_gap": 2},
        {"rule": "lion", "rank": 2, "update_proj_gap": 3, "basis": RandomBasis(), "lr": 0.001},
        {"rule": "sgd", "momentum": 0.9, "weight_decay": 0.0},
        {"rule": "torch_adamw", "lr": 0.1},
    ]
    named = [[(f"layer{index}", weight)] for index, weight in enumerate(together)]
    given = [{"params": params, **group} for params, group in zip(named, groups, strict=True)]
    optimizer = LowRankOptimizer(given, lr=0.01, weight_decay=0.1)
    assert [group["rule"] for group in optimizer.param_groups] == ["adamw", "lion", "sgd", "torch_adamw"]
    assert [group["betas"] for group in optimizer.param_groups] == [
        (0.9, 0.999),
        (0.9, 0.99),
        (0.9, 0.999),
        (0.9, 0.999),
    ]
    others = []
    for index, (weight, group) in enumerate(zip(apart, groups, strict=True)):
        others.append(LowRankOptimizer([{"params": [(f"layer{index}", weight)], **group}], lr=0.01, weight_decay=0.1))
    for step in range(7):
        set_gradients(together, step)
        set_gradients(apart, step)
        for each in (optimizer, *others):
            each.step()
    assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))
    fresh_weights = copies(together)
    named = [[(f"layer{index}", weight)] for index, weight in enumerate(fresh_weights)]
    fresh = LowRankOptimizer([{"params": params, **group} for params, group in zip(named, groups, strict=True)])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    train(fresh, fresh_weights, 7, 10)
    train(optimizer, together, 7, 10)
    assert all(torch.equal(*pair) for pair in zip(together, fresh_weights, strict=True))


def test_an_object_is_what_its_name_is():
    runs = []
    for group in ({"basis": SVDBasis("gram"), "lift": ProjectBack()}, {"basis": "svd", "lift": "project_back"}, {}):
        weight = parameter((6, 5))
        train(build(weight, **group), [weight], 0, 9)
        runs.append(weight.detach())
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_the_sign_of_any_direction_is_a_lift():
    """SGD's buffer is not to be changed by it."""
    weight = parameter((6, 5))
    optimizer = LowRankOptimizer([{"params": [weight], "lift": "sign"}], rule="sgd", momentum=0.9, lr=0.01)
    before = weight.detach().clone()
    set_gradients([weight], 0)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], weight.grad)
    torch.testing.assert_close(weight.detach(), before - 0.01 * weight.grad.sign())


class Clashing(Lift):
    def declare_state(self, weight, projection, group, shard):
        return {"exp_avg": StateTensor(weight.new_zeros(()))}


def test_two_objects_cannot_have_the_same_state():
    with pytest.raises(ValueError, match=r"two of the objects of 0\.0 declare state of the same name: .*exp_avg"):
        build(parameter((6, 5)), lift=Clashing())


class Undeclared(UpdateRule):
    def directions(self, updates, group):
        return [None for _ in updates]


def test_a_weight_without_a_direction_stays():
    """Undecayed, but counted."""
    weight = parameter((6, 5))
    before = weight.detach().clone()
    optimizer = build(weight, rule=Undeclared())
    train(optimizer, [weight], 0, 2)
    assert torch.equal(weight, before) and int(optimizer.state[weight]["step"]) == 2


@pytest.mark.parametrize("name", RULES)
def test_lots_of_matrices_move_one_after_the_other(name, monkeypatch):
    runs = []
    for numbers in (moving._NUMBERS_AT_ONCE, 1):
        monkeypatch.setattr(moving, "_NUMBERS_AT_ONCE", numbers)
        weights = [parameter((6, 5), 0), parameter((5, 6), 1), parameter((5,), 2)]
        optimizer = LowRankOptimizer([{"params": weights[:2], "rank": 2}, {"params": weights[2:]}], **RULES[name])
        train(optimizer, weights, 0, 5)
        runs.append(weights)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


# State formats.


@pytest.mark.parametrize("rank", [None, 3])
def test_state_in_float32_rounds_the_weight_once(rank):
    """A bf16 weight after each update is the float32 update of the one before, decay and step together, rounded."""
    weight = parameter((12, 8), dtype=torch.bfloat16)
    group = {"params": [weight], "rank": rank, "update_proj_gap": 3, "state_format": "float32"}
    optimizer = LowRankOptimizer([group], lr=0.02, weight_decay=0.01)
    assert {value.dtype for value in optimizer.state[weight].values() if value.ndim} == {torch.float32}
    wide = parameter((12, 8), dtype=torch.float32)
    reference = LowRankOptimizer([{**group, "params": [wide]}], lr=0.02, weight_decay=0.01)
    for step in range(7):
        wide.data.copy_(weight.data)
        weight.grad = matrix((12, 8), step).bfloat16()
        wide.grad = weight.grad.float()
        optimizer.step()
        reference.step()
        assert torch.equal(weight, wide.bfloat16())
    for key, value in optimizer.state[weight].items():
        assert torch.equal(value, reference.state[wide][key])


def test_state_in_8_bits_is_adamw8bits():
    weights = [parameter((80, 72), dtype=torch.float32) for _ in range(2)]
    for weight, settings in zip(weights, ({"state_format": "8bit"}, {"rule": "adamw8bit"}), strict=True):
        optimizer = build(weight, rank=64, **settings)
        train(optimizer, [weight], 0, 6)
        assert isinstance(optimizer.objects(weight).rule, AdamW8bit)
        assert optimizer.state[weight]["exp_avg"].dtype == torch.uint8
    assert torch.equal(*weights)


# What a training loop asks.


def test_extra_batches_are_wanted_where_a_basis_is_taken_from_the_gradient():
    weight = parameter((6, 5))
    optimizer = build(weight, refresh_accumulation=3, rand_ratio=0.5, num_training_steps=10)
    wanted = []
    for step in range(10):
        optimizer.begin_update(step)
        wanted.append(optimizer.wants_extra_batches())
        for index in range(wanted[-1]):
            set_gradients([weight], 100 + index)
            optimizer.observe_gradients()
            optimizer.zero_grad()
        set_gradients([weight], step)
        optimizer.step()
    assert wanted == [2, 0, 0, 0, 2, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="refresh_accumulation must be at least 1, got 0"):
        build(parameter((6, 5)), refresh_accumulation=0)


def test_metrics_are_told_once():
    weights = [parameter((6, 5), 0), parameter((5, 6), 1)]
    optimizer = LowRankOptimizer([{"params": weights, "rank": 2, "update_proj_gap": 2}])
    told = []
    for step in range(3):
        train(optimizer, weights, step, step + 1)
        told.append(optimizer.metrics())
        assert optimizer.metrics() == {}
    assert (
        told[0]["refreshed_layers"] == 2 and 0 < told[0]["captured_energy_min"] <= told[0]["captured_energy_mean"] <= 1
    )
    assert told[1] == {} and {"basis_overlap_mean", "basis_overlap_min"} <= told[2].keys()


def test_the_norm_may_be_that_of_whole_gradients():
    weight = parameter((6, 5))
    optimizer = build(weight, full_norm=True)
    set_gradients([weight], 0)
    torch.testing.assert_close(optimizer.grad_norm(), weight.grad.norm())
    optimizer.full_norm = False
    assert optimizer.grad_norm() < 0.9 * weight.grad.norm()


# Roles.


@pytest.fixture(params=[False, True], ids=["head of its own", "tied"])
def llama(request, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    path = write_model(tmp_path / "llama.json", tie_word_embeddings=request.param)
    return LlamaForCausalLM(LlamaConfig.from_json_file(str(path)))


def matrices_of(model):
    return {name for name, _ in model.named_parameters() if ".self_attn." in name or ".mlp." in name}


def test_roles_of_a_llama(llama):
    roles, tied = roles_of(llama, matrices_of(llama)), llama.config.tie_word_embeddings
    assert roles["model.embed_tokens.weight"] == ("head" if tied else "embedding")
    assert ("lm_head.weight" in roles) == (not tied)
    counts = {role: list(roles.values()).count(role) for role in set(roles.values())}
    assert counts == {"matrices": 14, "head": 1, "norms": 5} | ({} if tied else {"embedding": 1})
    assert "others" in roles_of(llama, ()).values()


def test_groups_by_role(llama):
    """With no settings the group stays what it is. A role that is not there makes no group."""
    roles, tied = roles_of(llama, matrices_of(llama)), llama.config.tie_word_embeddings
    regular = {"params": [(name, param) for name, param in llama.named_parameters() if roles[name] != "matrices"]}
    assert split_by_role(regular, roles, role_settings()) == [regular]
    settings = role_settings(adam_lr=0.001, head_lr=0.1, embed_weight_decay=0.3)
    groups = split_by_role(regular, roles, settings)
    found = [([name for name, _ in group["params"]], group["lr"], group.get("weight_decay")) for group in groups]
    norms = [name for name, role in roles.items() if role == "norms"]
    if tied:
        assert found == [(["model.embed_tokens.weight"], 0.1, None), (norms, 0.001, None)]
    else:
        embedding = (["model.embed_tokens.weight"], 0.001, 0.3)
        assert found == [embedding, (["lm_head.weight"], 0.1, None), (norms, 0.001, None)]
    optimizer = LowRankOptimizer(groups, lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5 * rate for _, rate, _ in found]
    with pytest.raises(ValueError, match=r"a role must be one of matrices, .*, got tail"):
        split_by_role(regular, roles, {"tail": {"lr": 1.0}})


def test_rates_by_role_move_what_they_are_for(llama):
    roles = roles_of(llama, matrices_of(llama))
    named = {"params": list(llama.named_parameters())}
    before = {name: param.detach().clone() for name, param in llama.named_parameters()}
    optimizer = LowRankOptimizer(split_by_role(named, roles, role_settings(adam_lr=0.0)), rule="torch_adamw", lr=0.01)
    tokens = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    llama(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    for name, param in llama.named_parameters():
        assert torch.equal(param, before[name]) == (roles[name] != "matrices"), name


def test_the_right_basis_follows_its_weight_in_float32():
    weight = parameter((6, 5), dtype=torch.float16)
    optimizer = LowRankOptimizer([{"params": [weight], "rank": 2, "state_format": "float32"}])
    train(optimizer, [weight], 0, 1)
    basis = optimizer.state[weight][RIGHT]
    torch.testing.assert_close(basis @ basis.T, torch.eye(2))
