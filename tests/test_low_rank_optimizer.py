"""Properties of the projected optimizer that hold for any weights and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_helpers import RULES, build, matrix, parameter, set_gradients, train

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.basis.bases import PROJECTION_TYPES
from peft_pretraining.optim.basis.svd import SVD_METHODS, random_stiefel
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, SIDES, Projection, overlap, projected_sides

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
ONE_SIDED = ["std", "left", "right", "reverse_std"]


@pytest.mark.parametrize(
    "side, tall, wide",
    [("std", RIGHT, LEFT), ("reverse_std", LEFT, RIGHT), ("left", LEFT, LEFT), ("right", RIGHT, RIGHT)],
)
def test_sides_are_decided_by_the_weights_shape(side, tall, wide):
    assert projected_sides(side, torch.Size((5, 3))) == projected_sides(side, torch.Size((4, 4))) == (tall,)
    assert projected_sides(side, torch.Size((3, 5))) == (wide,)
    assert projected_sides("full", torch.Size((3, 5))) == (LEFT, RIGHT)


def bases_of(projection, shape, seed=0):
    drawn = {side: random_stiefel(shape[side == RIGHT], projection.rank, torch.Generator().manual_seed(seed + i))
             for i, side in enumerate(projection.sides)}  # fmt: skip
    return {side: basis if side == LEFT else basis.T for side, basis in drawn.items()}


@given(shape=SHAPES, rank=st.integers(1, 14), side=st.sampled_from(SIDES))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_projection_goes_down_and_back(shape, rank, side):
    projection = Projection.for_weight(side, rank, torch.Size(shape))
    bases, grad, r = bases_of(projection, shape), matrix(shape, 1), min(rank, *shape)
    low_rank = projection.project(bases, grad)
    sizes = (r if LEFT in bases else shape[0], r if RIGHT in bases else shape[1])
    assert low_rank.shape == projection.low_rank_shape(torch.Size(shape)) == sizes
    up = projection.project_back(bases, low_rank)
    torch.testing.assert_close(projection.project(bases, up), low_rank)  # back and down again is nothing
    weight = matrix(shape, 2)
    expected = weight - 0.3 * up
    projection.add_projected_back(weight, bases, low_rank, -0.3)
    torch.testing.assert_close(weight, expected)


@given(shape=SHAPES, rank=st.integers(1, 6), side=st.sampled_from(SIDES))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_carrying_a_moment_over_is_projecting_it_back_and_down(shape, rank, side):
    projection = Projection.for_weight(side, rank, torch.Size(shape))
    old, new = bases_of(projection, shape, 1), bases_of(projection, shape, 7)
    moment = matrix(projection.low_rank_shape(torch.Size(shape)), 3)
    carried = projection.rotate_momentum(moment, old, new)
    torch.testing.assert_close(carried, projection.project(new, projection.project_back(old, moment)))
    torch.testing.assert_close(projection.rotate_momentum(moment, old, old), moment)
    assert float(overlap(old, old)) == pytest.approx(1, abs=1e-6) and float(overlap(old, new)) <= 1 + 1e-6


@given(shape=SHAPES, side=st.sampled_from(ONE_SIDED), method=st.sampled_from(SVD_METHODS),
       momentum=st.sampled_from([0.0, 0.9]))  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sgd_without_a_loss_of_rank_is_sgd(shape, side, method, momentum):
    """The unprojected limit: r = min(m, n) on the shorter side, scale 1, and one basis for the whole run, a rotation.
    With the same basis on the longer side it holds too, as long as gradients stay in the span of the first."""
    weight, plain = parameter(shape), parameter(shape)
    optimizer = build(weight, rule="sgd", rank=min(shape), scale=1.0, update_proj_gap=0, proj_type=side,
                      svd_method=method, momentum=momentum, dampening=0.5 * momentum)  # fmt: skip
    reference = torch.optim.SGD([plain], lr=0.01, momentum=momentum, dampening=0.5 * momentum)
    first = matrix(shape, 1)
    (which,) = projected_sides(side, torch.Size(shape))
    for step in range(6):
        weight.grad = first.clone() if step == 0 else matrix(shape, step + 1)
        if shape[which == RIGHT] > min(shape) and step:  # into the span: M G₀ has its row space, G₀ M its column space
            weight.grad = (
                matrix((shape[0], shape[0]), step) @ first if which == RIGHT
                else first @ matrix((shape[1], shape[1]), step)
            )  # fmt: skip
        plain.grad = weight.grad.clone()
        optimizer.step()
        reference.step()
        plain.data.mul_(1 - 0.01 * 0.1)  # decoupled decay, which torch's SGD does not have
    torch.testing.assert_close(weight, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("proj_type", PROJECTION_TYPES)
def test_zero_gradients_leave_the_weight_to_its_decay(name, proj_type):
    weight = parameter((6, 5), dtype=torch.float32)
    before = weight.detach().clone()
    optimizer = build(weight, proj_type=proj_type, rank=3, **RULES[name])
    for _ in range(6):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.1) ** 6)


@pytest.mark.parametrize("method", SVD_METHODS)
@pytest.mark.parametrize("proj_type", PROJECTION_TYPES)
def test_gradients_of_lower_rank_than_the_basis(method, proj_type):
    weight = parameter((6, 5), dtype=torch.float32)
    optimizer = build(weight, rank=3, proj_type=proj_type, svd_method=method)
    for step in range(6):
        weight.grad = torch.outer(matrix((6,), step, torch.float32), matrix((5,), step + 50, torch.float32))
        optimizer.step()
    assert weight.isfinite().all()
    for side, basis in optimizer.subspaces[weight].bases(optimizer.state[weight]).items():
        inner = basis.T @ basis if side == LEFT else basis @ basis.T
        assert inner.isfinite().all()
        if not proj_type.startswith("continuous"):
            torch.testing.assert_close(inner, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("proj_type", ["std", "full", *[name for name in PROJECTION_TYPES if "continuous" in name]])
def test_scaling_the_projected_gradients_is_scaling_the_gradients(proj_type):
    """Clipping: the same weights whether G is scaled, R is, or R twice. The basis optimizers see Ĝ and no scale."""
    weights, biases = [parameter((6, 5)) for _ in range(3)], [parameter((5,)) for _ in range(3)]
    optimizers = [build(weight, [bias], proj_type=proj_type) for weight, bias in zip(weights, biases, strict=True)]
    for step in range(6):
        for times, (weight, bias, optimizer) in enumerate(zip(weights, biases, optimizers, strict=True)):
            set_gradients([weight, bias], step)
            if times == 0:
                weight.grad *= 0.3
                bias.grad *= 0.3
            else:
                optimizer.project_gradients()
                for _ in range(times):
                    optimizer.scale_(torch.tensor(0.3 ** (1 / times), dtype=torch.float64))
            optimizer.step()
            optimizer.zero_grad()
    for index in (1, 2):
        torch.testing.assert_close(weights[0], weights[index], atol=1e-10, rtol=0)
        torch.testing.assert_close(biases[0], biases[index], atol=1e-10, rtol=0)


def test_gradients_for_norms_are_projected_ones_in_the_basis_of_the_update():
    weight, bias = parameter((6, 5)), parameter((5,))
    optimizer = build(weight, [bias], update_proj_gap=2)
    for step in range(4):
        set_gradients([weight, bias], step)
        optimizer.project_gradients()
        found = [grad.clone() for grad in optimizer.gradients()]
        optimizer.step()
        expected = [bias.grad, weight.grad @ optimizer.state[weight][RIGHT].T]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        optimizer.zero_grad()


def test_weights_without_a_gradient_stay_and_keep_their_place():
    """Each parameter counts its own updates: a layer that is frozen for a while has its first refresh when it joins."""
    weight, late = parameter((6, 5)), parameter((6, 5))
    optimizer = LowRankOptimizer([{"params": [weight, late], "rank": 2, "update_proj_gap": 4}])
    before = late.detach().clone()
    train(optimizer, [weight], 0, 3)
    assert torch.equal(late, before) and int(optimizer.state[late]["refreshes"]) == 0
    train(optimizer, [weight, late], 3, 5)
    assert [int(optimizer.state[param]["step"]) for param in (weight, late)] == [5, 2]
    assert [int(optimizer.state[param]["refreshes"]) for param in (weight, late)] == [2, 1]


def test_online_pca_steps_at_the_schedules_pace():
    """The basis's rate is lr_t / lr_base / update_proj_gap, and plain SGD shows it as it is."""
    weight = parameter((6, 5))
    optimizer = build(weight, proj_type="continuous_sgd", update_proj_gap=8, lr=0.02)
    train(optimizer, [weight], 0, 1)
    moves = []
    for rate in (0.02, 0.005, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        before = optimizer.state[weight][RIGHT].clone()
        saved = {key: value.clone() for key, value in optimizer.state[weight].items()}
        set_gradients([weight], 1)
        unit = (weight.grad / weight.grad.norm()).clone()
        optimizer.step()
        moves.append(optimizer.state[weight][RIGHT] - before)
        optimizer.state[weight].update(saved)
    error = unit @ before.T @ before - unit
    gradient = 2 * (before @ error.T @ unit + before @ unit.T @ error)
    torch.testing.assert_close(moves[0], -gradient / 8)
    torch.testing.assert_close(moves[1], -gradient / 32)
    assert not moves[2].any()


def test_online_pca_learns_the_subspace():
    """Gradients from one subspace that is not the first's: the captured energy rises towards 1."""
    weight = parameter((20, 12))
    optimizer = build(weight, rank=3, proj_type="continuous", update_proj_gap=20, lr=0.01)
    subspace = torch.linalg.qr(matrix((12, 3), 9)).Q.T

    def captured(step):
        weight.grad = matrix((20, 3), step) @ subspace
        optimizer.step()
        basis = torch.linalg.qr(optimizer.state[weight][RIGHT].T).Q
        return float((weight.grad @ basis).square().sum() / weight.grad.square().sum())

    weight.grad = matrix((20, 12), 1)
    optimizer.step()
    shares = [captured(step) for step in range(2, 60)]
    assert shares[0] < 0.6 and shares[-1] > 0.95


def test_a_scale_is_for_projected_weights_only():
    """Callers may give all groups the same settings but the rank."""
    scaled, plain = parameter((6, 5)), parameter((6, 5))
    train(build(scaled, rank=None, scale=0.5), [scaled], 0, 3)
    train(build(plain, rank=None, scale=1.0), [plain], 0, 3)
    assert torch.equal(scaled, plain)
