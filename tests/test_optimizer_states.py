"""States of every optimizer: saved and loaded, copied, converted and moved, with hooks and by name."""

import copy
import pickle

import pytest
import torch
from optimizer_kinds import BASES, RULES, assert_equal, every_kind, parameters, through_a_file, train, values
from torch import nn

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.vector_adamw import VectorAdamW


@every_kind
def test_a_saved_state_goes_on_as_if_nothing_had_been(kind):
    params = parameters()
    optimizer = kind(params)
    train(optimizer, params, 0, 3)
    saved, at = through_a_file(optimizer.state_dict()), values(params)
    train(optimizer, params, 3, 9)
    others = parameters()
    for param, value in zip(others, at, strict=True):
        param.data.copy_(value)
    fresh = kind(others, lr=0.5)
    fresh.load_state_dict(saved)
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]
    train(fresh, others, 3, 9)
    assert_equal(values(params), values(others))
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for mine, theirs in zip(others, params, strict=True):
        assert list(fresh.state[mine]) == list(optimizer.state[theirs])
        for key, value in optimizer.state[theirs].items():
            assert fresh.state[mine][key].dtype == value.dtype and torch.equal(fresh.state[mine][key], value), key


@every_kind
def test_a_loaded_state_is_a_copy_of_its_own(kind):
    params, others = parameters(), parameters()
    optimizer, fresh = kind(params), kind(others)
    train(optimizer, params, 0, 2)
    state = optimizer.state_dict()
    fresh.load_state_dict(state)
    before = copy.deepcopy(state)
    train(fresh, others, 2, 4)
    for index, tensors in before["state"].items():
        assert all(torch.equal(value, state["state"][index][key]) for key, value in tensors.items())


@every_kind
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_train_alike_and_apart(kind, copied):
    params = parameters()
    optimizer = kind(params)
    train(optimizer, params, 0, 3)
    twin, others = copied((optimizer, params))
    before = values(params)
    train(twin, others, 3, 6)
    assert_equal(values(params), before)
    train(optimizer, params, 3, 6)
    assert_equal(values(params), values(others))
    assert repr(twin) and twin.defaults["lr"] == optimizer.defaults["lr"]


@every_kind
def test_hooks_are_called_in_their_order(kind):
    params, others = parameters(), parameters()
    optimizer, fresh, seen = kind(params), kind(others), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before the step"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after the step"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append("after saving") or {**state, "more": 1})

    def halve(_, state):
        assert state["more"] == 1
        seen.append("before loading")
        groups = [{**group, "lr": 0.125} for group in state["param_groups"]]
        tensors = {index: {key: value.clone() for key, value in its.items()} for index, its in state["state"].items()}
        for its in tensors.values():
            its["step"] += 5
        return {**state, "state": tensors, "param_groups": groups}

    def check(loaded):
        seen.append("after loading")
        assert float(loaded.state[others[2]]["step"]) == 6 and loaded.param_groups[0]["lr"] == 0.125

    fresh.register_load_state_dict_pre_hook(halve)
    fresh.register_load_state_dict_post_hook(check)
    train(optimizer, params, 0, 1)
    fresh.load_state_dict(optimizer.state_dict())
    assert seen == [
        *("before the step", "after the step", "before saving", "after saving", "before loading", "after loading")
    ]
    assert float(fresh.state[others[2]]["step"]) == 6


@every_kind
def test_the_model_may_be_converted_after_construction(kind):
    """State keeps its dtype: the weights of float32 state and bfloat16 gradients stay near those of float32 ones."""
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):
        model = nn.ParameterList(parameters(torch.float32))
        optimizer = kind(list(model))
        dtypes = [[value.dtype for value in optimizer.state[param].values()] for param in model]
        model.to(dtype)
        plain = parameters(torch.float32)
        reference = kind(plain)
        train(optimizer, list(model), 0, 3)
        train(reference, plain, 0, 3)
        assert [[value.dtype for value in optimizer.state[param].values()] for param in model] == dtypes
        if kind.rule == "lion" and dtype == torch.bfloat16:
            continue  # signs turn where rounding is as large as the entry
        for one, other in zip(model, plain, strict=True):
            torch.testing.assert_close(one.detach().float(), other.detach(), atol=tolerance, rtol=tolerance)


@every_kind
def test_state_lies_where_the_weight_is(kind):
    """On a device without memory, from a state that was saved on another."""
    params = parameters(torch.float32)
    optimizer = kind(params)
    train(optimizer, params, 0, 2)
    elsewhere = [nn.Parameter(param.detach().to("meta")) for param in params]
    other = kind(elsewhere)
    other.load_state_dict(optimizer.state_dict())
    for param, original in zip(elsewhere, params, strict=True):
        state = other.state[param]
        counters = {"last_refresh", "refreshes", "basis_step"} & state.keys()
        if kind.rule != "vector":
            counters.add("step")
        assert {key for key, value in state.items() if value.device.type == "cpu"} == counters
        for key in counters:
            assert torch.equal(state[key], optimizer.state[original][key])
        for key in state.keys() - counters:
            state[key] = torch.zeros(state[key].shape, dtype=state[key].dtype)  # as after `model.to`
        assert {value.device.type for key, value in other.local_state(param).items() if key not in counters} <= {"meta"}


@every_kind
def test_named_parameters_are_matched_by_name(kind):
    """Also where one model is wrapped and the other is not. By another name they are others, and nothing is loaded."""
    shapes = {"a.weight": (4, 4), "b.weight": (4, 4), "c.weight": (4, 4)}

    def named(order, prefix=""):
        generator = torch.Generator().manual_seed(0)
        made = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        settings = RULES[kind.rule] if kind.rule != "vector" else {}
        group = {"params": [(prefix + name, made[name]) for name in order]}
        if kind.rule == "vector":
            return made, VectorAdamW([{**group, "vectors": 0}])
        return made, LowRankOptimizer([{**group, **BASES[kind.basis]}], **settings)

    weights, optimizer = named(shapes)
    train(optimizer, list(weights.values()), 0, 3)
    saved = through_a_file(optimizer.state_dict())
    others, other = named(reversed(shapes), "_orig_mod.module.")
    other.load_state_dict(saved)
    for name, weight in weights.items():
        for key, value in optimizer.state[weight].items():
            assert torch.equal(other.state[others[name]][key], value), (name, key)
    assert other.param_groups[0]["param_names"] == [f"_orig_mod.module.{name}" for name in reversed(shapes)]
    before = copy.deepcopy(other.state_dict())
    saved["param_groups"][0]["param_names"][1] = "d.weight"
    with pytest.raises(ValueError, match=r"state of other parameters: d.weight instead of b.weight"):
        other.load_state_dict(saved)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(value, after["state"][i][k]) for i, its in before["state"].items() for k, value in its.items()
    )
