"""The optimizers and helpers of the methods with low-rank factors."""

import pytest
import torch
from torch import nn

from peft_pretraining.config import Config
from peft_pretraining.methods import load_method
from peft_pretraining.methods._factors.rank_sync import assert_equal_on_all_ranks, checksum
from peft_pretraining.optim.state import state_reset
from peft_pretraining.optim.vector_adamw import VectorAdamW


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_vector_adamw_is_torchs_while_all_counts_are_equal(dtype, tolerance, decay):
    torch.manual_seed(0)
    shapes, settings = [(4, 6), (6, 4), (5,), (3, 3)], {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": decay}
    first = [torch.randn(shape, dtype=dtype) for shape in shapes]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in first] for _ in range(2))
    groups = [{"params": ours[:1], "vectors": 0}, {"params": ours[1:2], "vectors": 1}, {"params": ours[2:]}]
    optimizers = VectorAdamW(groups, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(10):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, dtype=dtype)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("vectors", [0, 1])
def test_each_vector_has_its_own_count(vectors):
    """A vector that is reset goes on as in a new optimizer, and the others as if nothing had been."""
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 3, dtype=torch.float64), torch.randn(6, 3, 3, dtype=torch.float64)

    def run(reset_at=None, first=0, weight=start):
        param = nn.Parameter(weight.clone())
        optimizer = VectorAdamW([{"params": [param], "vectors": vectors}], lr=0.1)
        for t in range(first, 6):
            if t == reset_at:
                middle = param.detach().clone()
                for key in state_reset.MOMENTS:
                    optimizer.state[param][key].select(vectors, 1).zero_()
                optimizer.state[param]["step"][1] = 0
            param.grad = gradients[t].clone()
            optimizer.step()
        return (param.detach(), middle) if reset_at else param.detach()

    (reset, middle), whole = run(reset_at=3), run()
    afresh = run(first=3, weight=middle)
    for vector in range(3):
        expected = afresh if vector == 1 else whole
        assert torch.equal(reset.select(vectors, vector), expected.select(vectors, vector))


def test_vector_adamw_converges():
    torch.manual_seed(0)
    target, param = torch.randn(4, 6), nn.Parameter(torch.zeros(4, 6))
    optimizer = VectorAdamW([{"params": [param], "vectors": 0}], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (param - target).square().sum().backward()
        optimizer.step()
    assert (param - target).abs().max() < 1e-2


def test_vector_adamw_state_is_there_at_once_and_survives_a_state_dict():
    param = nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16))
    optimizer = VectorAdamW([{"params": [param], "vectors": 1}])
    state = optimizer.state[param]
    assert {key: (tuple(value.shape), value.dtype) for key, value in state.items()} == {
        **{"step": ((6,), torch.float32), "exp_avg": ((4, 6), torch.bfloat16)},
        **{"exp_avg_sq": ((4, 6), torch.bfloat16)},
    }
    param.grad = torch.randn_like(param)
    optimizer.step()
    other = VectorAdamW([{"params": [nn.Parameter(torch.zeros_like(param))], "vectors": 1}])
    other.load_state_dict(optimizer.state_dict())
    for loaded, saved in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(loaded[key], saved[key]) and loaded[key].dtype == saved[key].dtype for key in saved)


def test_vectors_are_of_matrices():
    for vectors, shape in ((0, (5,)), (2, (5, 5))):
        with pytest.raises(ValueError, match="vectors must be"):
            VectorAdamW([{"params": [nn.Parameter(torch.zeros(shape))], "vectors": vectors}])


# ReLoRA's resets.


def trained_relora(**settings):
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(20, 30), "head": nn.Linear(30, 2)})
    defaults = {"method": "relora", "rank": 4, "relora": 3, "lora_alpha": 4.0}
    method = load_method("relora")(Config.from_settings({**defaults, **settings}))
    model = method.convert(model)
    optimizer = method.build_optimizer(model)
    for step in range(3):
        method.before_update(model, optimizer, step)
        model["head"](model["mlp"](torch.randn(8, 20))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return method, model, optimizer


def moments_of(optimizer, params):
    return [optimizer.state[param][key].clone() for param in params for key in state_reset.MOMENTS]


RESETS = {
    "all": {},
    "random": {"optimizer_random_pruning": 0.7, "reset_optimizer_on_relora": False},
    "magnitude": {"optimizer_magnitude_pruning": 0.7, "reset_optimizer_on_relora": False},
    "none": {"reset_optimizer_on_relora": False},
}


@pytest.mark.parametrize("kind", RESETS)
def test_what_a_reset_leaves(kind):
    method, model, optimizer = trained_relora(**RESETS[kind])
    factors = [model["mlp"].lora_A, model["mlp"].lora_B]
    held = [optimizer.state[param][key] for param in factors for key in state_reset.MOMENTS]
    before, other = moments_of(optimizer, factors), moments_of(optimizer, model["head"].parameters())
    method.before_update(model, optimizer, 3)
    after = moments_of(optimizer, factors)
    if kind == "all":
        assert all(moment.count_nonzero() == 0 for moment in after)
    elif kind == "none":
        assert all(map(torch.equal, before, after))
    for old, new in zip(before, after, strict=True):
        kept = new != 0
        assert torch.equal(new[kept], old[kept])
        if kind == "random":
            assert 0.15 < kept.float().mean() < 0.45
        if kind == "magnitude":
            assert torch.equal(kept, old.abs() >= torch.quantile(old.abs().flatten(), 0.7))
    if kind == "random":  # first and second moment lose the same entries
        assert torch.equal(after[0] != 0, after[1] != 0) and torch.equal(after[2] != 0, after[3] != 0)
    assert all(map(torch.equal, other, moments_of(optimizer, model["head"].parameters())))
    assert [int(optimizer.state[param]["step"]) for param in factors] == [3, 3]
    assert all(one is optimizer.state[param][key] for one, (param, key) in zip(
        held, ((param, key) for param in factors for key in state_reset.MOMENTS), strict=True))  # fmt: skip


def test_resets_may_be_rarer_than_merges():
    """Every --cycle_length updates, where that is given."""
    method, model, optimizer = trained_relora(cycle_length=6)
    method.before_update(model, optimizer, 3)
    assert model["mlp"].lora_B.count_nonzero() == 0  # merged
    assert optimizer.state[model["mlp"].lora_B]["exp_avg"].count_nonzero() > 0
    method.before_update(model, optimizer, 6)
    assert optimizer.state[model["mlp"].lora_B]["exp_avg"].count_nonzero() == 0


def test_a_merge_draws_another_a_and_puts_a_trained_scale_back():
    method, model, optimizer = trained_relora(train_scaling=True)
    layer = model["mlp"]
    with torch.no_grad():
        layer.scaling.fill_(0.3)
    before, function = layer.lora_A.clone(), layer.merged_weight()
    method.before_update(model, optimizer, 3)
    assert layer.scaling == 1 and (layer.lora_A != before).all()
    assert layer.lora_A.abs().max() <= 20**-0.5 and layer.lora_B.count_nonzero() == 0
    torch.testing.assert_close(layer.merged_weight(), function, rtol=0, atol=1e-6)


# Rates, and a body without frozen weights.


@pytest.mark.parametrize("name", ["lora", "relora", "switchlora", "golore_adapter"])
def test_rates_of_a_b_and_everything_else(name):
    model = nn.ModuleDict({"mlp": nn.Linear(8, 6), "head": nn.Linear(6, 2)})
    settings = {"method": name, "lr": 0.5, "rank": 2, "lora_plus_ratio": 4.0, "dense_lr_ratio": 0.1, "lora_alpha": 1.0}
    method = load_method(name)(Config.from_settings(settings))
    model = method.convert(model)
    optimizer = method.build_optimizer(model)
    rates = {param: group["initial_lr"] for group in optimizer.param_groups for param in group["params"]}
    assert rates[model["head"].weight] == rates[model["mlp"].bias] == pytest.approx(0.05)
    if model["mlp"].lora_A.requires_grad:
        assert rates[model["mlp"].lora_A] == 0.5
    if model["mlp"].lora_B.requires_grad:
        assert rates[model["mlp"].lora_B] == 2.0
    assert set(rates) == {param for param in model.parameters() if param.requires_grad}


def test_low_rank_only_gives_gradients_to_every_factor():
    """Two layers in a row: with B = 0 neither would ever get one. Their product has the weight's spread."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(400, 300), "mlp": nn.Linear(300, 400)})
    spread = {name: linear.weight.std() for name, linear in model.items()}
    method = load_method("lora")(Config.from_settings({"method": "lora", "rank": 100, "lora_only": True}))
    model = method.convert(model)
    for name, layer in model.items():
        assert layer.merged_weight().std() == pytest.approx(spread[name].item(), rel=0.05)
    model["mlp"](model["attn"](torch.randn(5, 400))).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for layer in model.values() for p in (layer.lora_A, layer.lora_B))


# Checks over ranks.


def test_a_checksum_sees_every_bit_and_its_place():
    tensor = torch.randn(50, 7)
    first = checksum(tensor)
    for change in (
        lambda t: t.flatten().__setitem__(349, t.flatten()[349] + 1e-6),
        lambda t: t.copy_(t.flip(0)),
        lambda t: t[3].copy_(t[4]),
    ):
        other = tensor.clone()
        change(other)
        assert not torch.equal(other, tensor) and checksum(other) != first
    assert checksum(tensor.clone()) == first
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.uint8):
        assert checksum(torch.ones(3, 3, dtype=dtype)) > 0


def test_ranks_that_differ_are_found_and_named():
    """A stand-in for the mean over two ranks, of which the other one holds `far`."""
    near, far = ({name: nn.Linear(3, 3) for name in ("a", "b", "c")} for _ in range(2))
    for name, layer in far.items():
        layer.load_state_dict(near[name].state_dict())

    def of_two(layers, others):
        seen = []

        def reduce(tensor):
            seen.append(tensor.clone())
            if len(seen) == 1:
                theirs = []
                assert_equal_on_all_ranks(others, lambda t: theirs.append(t.clone()) or t, 0)
                return tensor.add_(theirs[0]).div_(2)
            return tensor

        assert_equal_on_all_ranks(layers, reduce, 7)

    of_two(near, far)
    with torch.no_grad():
        far["b"].weight[1, 1] += 1e-6
    with pytest.raises(RuntimeError, match=r"before update 7 the ranks differ in 1 of 3 layers, first in b"):
        of_two(near, far)
