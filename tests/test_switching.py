"""SwitchLoRA's exchange of vectors: the function stays, whatever overlaps; what is reset, frozen and saved."""

import pytest
import torch
from torch import nn

from peft_pretraining.config import Config
from peft_pretraining.methods.switchlora.method import SwitchLoRA
from peft_pretraining.methods.switchlora.schedule import SwitchSchedule, allowed_count
from peft_pretraining.nn.exchange import exchange, exchange_together, swap
from peft_pretraining.nn.switching import Switch, SwitchedLinear, SwitchState
from peft_pretraining.optim.tensors.zeroing import Vectors, zero_together, zero_vectors


def switched_layer(m=8, n=6, rank=4, dtype=torch.float64, kind="switchlora", shuffled=False, **options):
    torch.manual_seed(0)
    layer = SwitchedLinear(nn.Linear(n, m, dtype=dtype), rank, 1 / rank)
    state = SwitchState(layer, **options)
    state.fill(layer, kind, torch.Generator().manual_seed(1), zero_b=False, shuffled=shuffled)
    layer.add_candidates(state)
    with torch.no_grad():  # as if trained: the live vectors are no longer those of the pool
        layer.lora_A.add_(torch.randn_like(layer.lora_A))
        layer.lora_B.add_(torch.randn_like(layer.lora_B))
    return layer


def deviation(layer, switch, **options):
    before = layer.merged_weight().double()
    exchange([(layer, switch)], **options)
    return float((layer.merged_weight().double() - before).abs().max() / before.abs().max())


OVERLAPS = {
    "its own place": Switch([1], [3], [0], [4]),  # slot 1 of A holds candidate 3, slot 0 of B candidate 4
    "each other's places": Switch([0, 1], [3, 2], [2, 3], [3, 2]),
    "a place that another leaves": Switch([0, 1], [5, 2], [0, 1], [0, 4]),
    "all of them": Switch([0, 1, 2, 3], [3, 4, 5, 0], [3, 2, 1, 0], [0, 1, 2, 3]),
    "the same slots in both": Switch([2], [0], [2], [0]),
    "only A": Switch([2], [0]),
    "only B": Switch([], [], [2], [0]),
}


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("case", OVERLAPS)
def test_overlapping_candidates_keep_the_function(case, drop, dtype, bound):
    layer = switched_layer(dtype=dtype)
    switch, state = OVERLAPS[case], layer.switching
    assert state.selected_A.tolist() == [2, 3, 4, 5] and state.selected_B.tolist() == [4, 5, 2, 3]
    assert deviation(layer, switch, drop=drop) <= bound
    for slot, candidate in zip(switch.slots_a, switch.incoming_a, strict=True):
        assert state.selected_A[slot] == candidate
        assert torch.equal(layer.lora_A[slot], state.candidates_A[candidate])
    for slot, candidate in zip(switch.slots_b, switch.incoming_b, strict=True):
        assert state.selected_B[slot] == candidate
        assert torch.equal(layer.lora_B[:, slot], state.candidates_B[candidate])


@pytest.mark.parametrize("shape", [(5, 5), (7, 5), (5, 9)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_pool_barely_larger_than_the_rank(shape, shuffled):
    """c = 5, r = 4: more would be asked for than there is; every candidate comes round, and the function stays."""
    layer = switched_layer(*shape, rank=4, shuffled=shuffled)
    state, seen = layer.switching, set()
    for step in range(40):
        count = allowed_count(2, 4, state.frozen_count(), state.candidates)
        assert count == 1  # and not 2: k <= c - r
        generator = torch.Generator().manual_seed(step)
        switch = state.next_at_random(count, True, generator) if shuffled else state.next_in_ring(count, True)
        assert deviation(layer, switch) < 1e-13
        assert len(set(state.selected_A.tolist())) == len(set(state.selected_B.tolist())) == 4
        seen |= set(state.selected_A.tolist())
    assert seen == set(range(5))


def test_a_vector_that_goes_out_comes_back_as_it_was():
    layer = switched_layer()
    state, trained = layer.switching, layer.lora_A[0].clone()
    exchange([(layer, Switch([0], [1]))])
    assert not torch.equal(layer.lora_A[0], trained)
    exchange([(layer, Switch([3], [2]))])  # candidate 2 is the one that slot 0 held
    assert torch.equal(layer.lora_A[3], trained) and state.selected_A.tolist() == [1, 3, 4, 2]


def test_drop_takes_off_the_old_value_and_keeps_the_length():
    layer = switched_layer()
    state = layer.switching
    old, out = state.candidates_A[2].clone(), layer.lora_A[0].clone()
    exchange([(layer, Switch([0], [1]))], drop=0.5)
    expected = out - 0.5 * old
    torch.testing.assert_close(state.candidates_A[2], expected * out.norm() / expected.norm())


def test_layers_of_different_shapes_exchange_at_once_as_alone():
    shapes, layers = [(8, 6), (6, 8), (20, 3), (3, 3)], []
    for _ in range(2):
        layers.append([switched_layer(*shape, rank=2) for shape in shapes])
    switches = [
        Switch([0], [0], [1], [0]),
        Switch([1], [2]),
        Switch([], [], [0], [0]),
        Switch([0, 1], [1, 2], [1], [0]),
    ]
    exchange(list(zip(layers[0], switches, strict=True)))
    for layer, switch in zip(layers[1], switches, strict=True):
        exchange([(layer, switch)])
    for together, alone in zip(*layers, strict=True):
        for name, tensor in together.state_dict().items():
            assert torch.equal(tensor, alone.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pools", ["on the device", "elsewhere"])
def test_layers_of_one_shape_exchange_together_as_one_after_the_other(monkeypatch, dtype, pools):
    """Different numbers of vectors, none of one factor, and shapes that only some share."""
    shapes = [(8, 6), (8, 6), (6, 8), (8, 6), (6, 8)]
    switches = [
        *(Switch([0], [0], [1], [0]), Switch([1, 3], [0, 1], [2, 0], [0, 1]), Switch([], [], [0], [0])),
        *(Switch([2], [1]), Switch([0, 1], [1, 0], [1], [0])),
    ]
    layers = [[switched_layer(*shape, dtype=dtype) for shape in shapes] for _ in range(2)]
    for layer in (each for own in layers for each in own):
        layer._rest = torch.zeros(layer.weight.shape, dtype=torch.int16) if dtype == torch.bfloat16 else None
    if pools == "elsewhere":
        monkeypatch.setattr("peft_pretraining.nn.exchange.swap_on_device", lambda s, out: swap(s, out, 0.0))
    one = exchange(list(zip(layers[0], switches, strict=True)))
    other = exchange_together(list(zip(layers[1], switches, strict=True)), 0.0, True)
    for expected, correction in zip(one, other, strict=True):
        torch.testing.assert_close(correction, expected, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)
    for expected, layer in zip(*layers, strict=True):
        torch.testing.assert_close(layer.exact_weight(), expected.exact_weight(), rtol=0, atol=1e-6)
        for name, tensor in layer.state_dict().items():
            if name not in ("weight", "weight_rest"):
                assert torch.equal(tensor, expected.state_dict()[name]), name


def test_vectors_of_one_shape_are_zeroed_together_as_one_after_the_other():
    torch.manual_seed(0)
    chosen = [(0, [1, 2], (4, 6)), (1, [5], (4, 6)), (1, [0, 3], (4, 6)), (0, [0], (7,)), (0, [2, 6], (7,))]
    tensors = [torch.randn(shape) for *_, shape in chosen]
    for zero in (zero_vectors, zero_together):
        copies = [tensor.clone() for tensor in tensors]
        zero([Vectors(c, dim, indices) for c, (dim, indices, _) in zip(copies, chosen, strict=True)], copies[0].device)
        for copy, tensor, (dim, indices, _) in zip(copies, tensors, chosen, strict=True):
            kept = [index for index in range(tensor.shape[dim]) if index not in indices]
            assert not copy.index_select(dim, torch.tensor(indices)).any()
            assert torch.equal(*(each.index_select(dim, torch.tensor(kept)) for each in (copy, tensor)))


def test_only_updates_that_switch_or_freeze_act_before_the_step():
    """In all others nobody need know before the step whether the update takes place."""
    torch.manual_seed(0)
    method, model, optimizer = method_for([nn.Linear(8, 12, dtype=torch.float64)], adam_warm_step=2)
    method.prepare(model, optimizer, lambda tensor: tensor)
    method.requested_count = lambda rank, step, index: int(step in (1, 6))
    acted, switched = [], []
    for step in range(10):
        acted.append(method.acts_before_step(optimizer, step))
        update(method, model, optimizer, step)
        switched.append(optimizer.reported["switched_vectors"])
    assert [step for step, each in enumerate(switched) if each] == [1, 6]
    assert [step for step, each in enumerate(acted) if each] == [1, 2, 6, 7]


def test_corrections_of_bf16_weights_are_rounded_once():
    layer = switched_layer(dtype=torch.bfloat16)
    weight, switch = layer.weight.clone().float(), Switch([0, 1], [0, 1], [2, 3], [0, 1])
    a, b = layer.lora_A.detach().clone().float(), layer.lora_B.detach().clone().float()
    exchange([(layer, switch)])
    new_a, new_b = layer.lora_A.detach().float(), layer.lora_B.detach().float()
    correction = 0.25 * (b[:, :2] @ (a[:2] - new_a[:2]) + (b[:, 2:] - new_b[:, 2:]) @ new_a[2:])
    torch.testing.assert_close(layer.weight.data, (weight + correction).bfloat16(), rtol=0, atol=0)


# Schedule and method.


def method_for(layers, **settings):
    model = nn.ModuleDict({f"mlp{i}": layer for i, layer in enumerate(layers)})
    defaults = {"method": "switchlora", "lora_alpha": 1.0, "rank": 4, "init_lora_type": "switchlora"}
    method = SwitchLoRA(Config.from_settings({**defaults, "switch_lora_interval": 4.0, **settings}))
    model = method.convert(model)
    return method, model, method.build_optimizer(model)


def update(method, model, optimizer, step):
    optimizer.begin_update(step)
    method.before_update(model, optimizer, step)
    for layer in model.values():
        x = torch.randn(5, layer.in_features, dtype=layer.lora_A.dtype, generator=torch.Generator().manual_seed(step))
        layer(x).square().sum().backward()
    method.before_step(model, optimizer, step)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("rank", [1, 5, 100])
def test_ranks_at_the_ends(rank):
    """Rank 1 has no second half to run in, rank min(m, n) no candidate to spare: neither switches, both train."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8, dtype=torch.float64), nn.Linear(8, 5, dtype=torch.float64)]
    method, model, optimizer = method_for(layers, rank=rank)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(5):
        update(method, model, optimizer, step)
        assert optimizer.reported["switched_vectors"] == 0
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-1] for name in changed} == {"lora_A", "lora_B", "bias"}


def test_layers_of_different_shapes_and_effective_ranks_in_one_model():
    torch.manual_seed(0)
    layers = [nn.Linear(n, m, dtype=torch.float64) for m, n in ((20, 12), (12, 20), (16, 16), (3, 20), (40, 2))]
    method, model, optimizer = method_for(layers, rank=8, adam_warm_step=2, switch_lora_descent_rate=1.0)
    assert [layer.rank for layer in model.values()] == [8, 8, 8, 3, 2]
    switched = 0
    for step in range(12):
        before = [layer.merged_weight() for layer in model.values()]
        step_of = optimizer.step
        optimizer.step = lambda: None  # look between the switch and the update
        update(method, model, optimizer, step)
        optimizer.step = step_of
        for layer, weight in zip(model.values(), before, strict=True):
            torch.testing.assert_close(layer.merged_weight(), weight, rtol=0, atol=1e-13)
        switched += optimizer.reported["switched_vectors"]
    assert switched > 50


def test_counterparts_are_reset_and_frozen():
    """An exchanged row of A: the column of B beside it starts anew, is frozen for w updates, and still counts."""
    torch.manual_seed(0)
    method, model, optimizer = method_for([nn.Linear(8, 12, dtype=torch.float64)], adam_warm_step=2)
    layer = model["mlp0"]
    method.plan = lambda layer, step, index: Switch([1], [0], [2], [0]) if step == 3 else Switch()
    frozen = []
    for step in range(7):
        held = layer.lora_A[2].clone(), layer.lora_B[:, 1].clone()
        update(method, model, optimizer, step)
        frozen.append((torch.equal(layer.lora_A[2], held[0]), torch.equal(layer.lora_B[:, 1], held[1])))
    assert frozen == [(False, False)] * 3 + [(True, True)] * 2 + [(False, False)] * 2
    assert optimizer.state[layer.lora_A]["step"].tolist() == [7, 7, 4, 7]
    assert optimizer.state[layer.lora_B]["step"].tolist() == [7, 4, 7, 7]


def test_moved_models_keep_their_pools_where_they_are():
    layer = switched_layer(dtype=torch.float32)
    pool = layer.switching.candidates_A
    layer.to(torch.float64)
    assert layer.switching.candidates_A is pool and not list(layer.switching.buffers())


def test_a_state_dict_holds_everything_once():
    layer, other = switched_layer(), switched_layer(shuffled=True)
    exchange([(layer, Switch([1], [0], [2], [1]))])
    layer.switching.next_in_ring(3, True)
    layer.switching.frozen_A[1] = 4
    other.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    for name in SwitchState.NAMES:
        assert torch.equal(getattr(other.switching, name), getattr(layer.switching, name)), name
    broken = layer.state_dict()
    broken["switching.candidates_A"] = torch.zeros(2, 2)
    del broken["switching.pointers"]
    with pytest.raises(RuntimeError, match=r"switching.pointers[\s\S]*candidates_A has shape \(2, 2\)"):
        other.load_state_dict(broken)


def test_the_clamp_keeps_frozen_slots_from_being_switched():
    """With as many switches as are allowed no frozen slot is switched, and A's and B's stay apart."""
    torch.manual_seed(0)
    method, model, optimizer = method_for(
        [nn.Linear(30, 40)], rank=9, adam_warm_step=3, switch_lora_interval=6.0, fix_switch_lora_interval=True
    )
    state, done = model["mlp0"].switching, 0
    plan = method.plan

    def checked(layer, step, index):
        frozen_a, frozen_b = state.frozen_A > 0, state.frozen_B > 0
        switch = plan(layer, step, index)
        assert not frozen_a[switch.slots_a].any() and not frozen_b[switch.slots_b].any()
        assert not set(switch.slots_a) & set(switch.slots_b)
        return switch

    method.plan = checked
    for step in range(60):
        update(method, model, optimizer, step)
        done += optimizer.reported["switched_vectors"]
    assert done > 2 * 60


def test_counts_depend_on_seed_update_and_layer_alone():
    method, *_ = method_for([nn.Linear(8, 12)])
    other, *_ = method_for([nn.Linear(12, 8), nn.Linear(8, 12)])
    assert [method.draw_uniform(step, 1) for step in range(9)] == [other.draw_uniform(step, 1) for step in range(9)]
    drawn = {method.draw_uniform(step, index) for step in range(9) for index in range(9)}
    assert len(drawn) == 81 and all(0 <= number < 1 for number in drawn)
    other, *_ = method_for([nn.Linear(8, 12)], seed=1)
    assert other.draw_uniform(0, 0) != method.draw_uniform(0, 0)


def test_a_rate_far_beyond_the_descent_is_small_but_not_zero():
    for kind in ("exponential", "Z"):
        assert SwitchSchedule(40, 1.0, kind).rate(10**6) == 1e-8
