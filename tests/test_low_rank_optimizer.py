"""Properties of the projected optimizer that hold for any weights and gradients."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.bases import LEFT, RIGHT, SVDBasis, projected_sides

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
PROJECTIONS = ["std", "reverse_std", "left", "right", "full"]


def matrix(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(weight, regular=(), **group):
    settings = {"rank": 2, "update_proj_gap": 4, "scale": 0.5, "proj_type": "std", **group}
    groups = [{"params": [weight], **settings}]
    if regular:
        groups.insert(0, {"params": list(regular)})
    return LowRankOptimizer(groups, lr=0.01, weight_decay=0.1)


def train(optimizer, weights, first, last, dtype=torch.float64):
    for step in range(first, last):
        for index, weight in enumerate(weights):
            weight.grad = matrix(weight.shape, seed=100 * step + index, dtype=dtype)
        optimizer.step()
        optimizer.zero_grad()


@given(shape=SHAPES, rank=st.integers(1, 14), proj_type=st.sampled_from(PROJECTIONS))
@settings(max_examples=60, deadline=None)
def test_bases_are_orthonormal_and_hold_the_gradient_best(shape, rank, proj_type):
    basis, grad = SVDBasis.for_weight(proj_type, rank, torch.Size(shape)), matrix(shape)
    state = {}
    basis.init_state(state, grad)
    new = basis.refreshed(basis.bases(state), grad, first=True)
    r = min(rank, *shape)
    if LEFT in new:
        torch.testing.assert_close(new[LEFT].T @ new[LEFT], torch.eye(r, dtype=grad.dtype))
    if RIGHT in new:
        torch.testing.assert_close(new[RIGHT] @ new[RIGHT].T, torch.eye(r, dtype=grad.dtype))
    kept = basis.down(new, grad)
    assert kept.shape == basis.low_rank_shape(torch.Size(shape))
    best = torch.linalg.svdvals(grad)[:r].square().sum()  # Eckart-Young
    torch.testing.assert_close(kept.square().sum(), best)


@given(shape=SHAPES, proj_type=st.sampled_from(["std", "reverse_std", "left", "right"]))
@settings(max_examples=30, deadline=None)
def test_full_rank_projection_keeps_the_gradient(shape, proj_type):
    """With r = min(m, n), projecting the shorter side and back changes nothing."""
    basis, grad = SVDBasis.for_weight(proj_type, min(shape), torch.Size(shape)), matrix(shape)
    bases = basis.refreshed({}, grad, first=True)
    back = torch.zeros_like(grad)
    basis.add_back(back, bases, basis.down(bases, grad), 1.0)
    torch.testing.assert_close(back, grad)


@pytest.mark.parametrize("shape, sides", [((5, 3), (RIGHT,)), ((3, 5), (LEFT,)), ((4, 4), (RIGHT,))])
def test_std_projects_the_shorter_side(shape, sides):
    assert projected_sides("std", torch.Size(shape)) == sides
    with pytest.raises(ValueError, match="proj_type must be one of"):
        projected_sides("sideways", torch.Size(shape))


def test_signs_make_runs_agree_and_follow_the_old_basis():
    grad, basis = matrix((8, 6)), SVDBasis.for_weight("left", 3, torch.Size((8, 6)))
    first = basis.refreshed({}, grad, first=True)[LEFT]
    assert (first.gather(0, first.abs().argmax(0, keepdim=True)) > 0).all()
    again = basis.refreshed({LEFT: -first}, grad + 1e-3 * matrix((8, 6), 1), first=False)[LEFT]
    assert ((again * -first).sum(0) >= 0).all()
    assert (again * first).sum(0).max() < -0.9  # turned against the convention of the first refresh


def test_adamw_of_regular_parameters_is_torchs_with_rescaled_epsilon_and_late_decay():
    """eps before the bias correction is torch's eps divided by sqrt(1 - beta2^k); without decay the rest is equal."""
    ours, theirs = (torch.nn.Parameter(matrix((4, 3))) for _ in range(2))
    optimizer = LowRankOptimizer([ours], lr=0.01, eps=1e-6)
    for step in range(5):
        ours.grad = matrix((4, 3), seed=step + 1)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        if step == 0:
            reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
        reference.param_groups[0]["eps"] = 1e-6 / math.sqrt(1 - 0.999 ** (step + 1))
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)


def test_one_update_by_hand():
    """W <- W - lr * correction * scale * P (m / (sqrt(v) + eps)), then W <- W - lr * decay * W."""
    weight = torch.nn.Parameter(matrix((4, 6)))
    before, grad = weight.detach().clone(), matrix((4, 6), seed=1)
    optimizer = build(weight, proj_type="left")
    weight.grad = grad.clone()
    optimizer.step()
    p = optimizer.state[weight][LEFT]
    r = p.T @ grad
    m, v = 0.1 * r, 0.001 * r**2
    after = before - 0.01 * math.sqrt(1 - 0.999) / (1 - 0.9) * 0.5 * (p @ (m / (v.sqrt() + 1e-6)))
    torch.testing.assert_close(weight.detach(), after * (1 - 0.01 * 0.1), atol=1e-14, rtol=0)


def refreshed_at(optimizer, weight, steps):
    """The steps at which the basis changed."""
    changed = []
    for step in range(steps):
        old = optimizer.state[weight][RIGHT].clone()
        train(optimizer, [weight], step, step + 1)
        if not torch.equal(old, optimizer.state[weight][RIGHT]):
            changed.append(step)
    return changed


@pytest.mark.parametrize("gap, expected", [(4, [0, 4, 8]), (1, list(range(10))), (0, [0])])
def test_refreshes_fall_on_multiples_of_the_gap(gap, expected):
    weight = torch.nn.Parameter(matrix((6, 5)))
    assert refreshed_at(build(weight, update_proj_gap=gap), weight, 10) == expected


def test_a_refresh_that_is_not_committed_stays_due():
    weight, other = torch.nn.Parameter(matrix((6, 5))), torch.nn.Parameter(matrix((6, 5)))
    optimizer = LowRankOptimizer([{"params": [weight, other], "rank": 2, "update_proj_gap": 4}])
    train(optimizer, [weight, other], 0, 4)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.update_step = 4
    weight.grad, other.grad = matrix((6, 5)), matrix((6, 5))
    other.grad[0, 0] = math.nan  # only one layer is bad, but the update is skipped as a whole
    optimizer.project_gradients()
    assert not torch.stack([grad.norm() for grad in optimizer.gradients()]).isfinite().all()
    optimizer.zero_grad()
    for old, new in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    optimizer.update_step = 5
    train(optimizer, [weight, other], 5, 6)
    assert [int(optimizer.state[param]["last_refresh"]) for param in (weight, other)] == [5, 5]
    optimizer.update_step = 7
    train(optimizer, [weight, other], 7, 8)
    assert int(optimizer.state[weight]["last_refresh"]) == 5
    optimizer.update_step = 8  # the late refresh does not move the next one
    train(optimizer, [weight, other], 8, 9)
    assert int(optimizer.state[weight]["last_refresh"]) == 8


@pytest.mark.parametrize("make", [torch.zeros_like, lambda w: torch.ones_like(w)], ids=["zero", "rank one"])
def test_degenerate_gradients_stay_finite(make):
    weight = torch.nn.Parameter(matrix((6, 5)))
    optimizer = build(weight, rank=3)
    for _ in range(6):
        weight.grad = make(weight)
        optimizer.step()
    assert weight.isfinite().all()
    basis = optimizer.state[weight][RIGHT]
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=basis.dtype))


def test_scaling_the_projected_gradients_is_scaling_the_gradients():
    weights = [torch.nn.Parameter(matrix((6, 5))) for _ in range(2)]
    bias = [torch.nn.Parameter(matrix((5,))) for _ in range(2)]
    optimizers = [build(weight, [regular]) for weight, regular in zip(weights, bias, strict=True)]
    for step in range(6):
        for weight, regular in zip(weights, bias, strict=True):
            weight.grad, regular.grad = matrix((6, 5), step), matrix((5,), step)
        weights[0].grad *= 0.3
        bias[0].grad *= 0.3
        optimizers[1].project_gradients()
        torch._foreach_mul_(optimizers[1].gradients(), torch.tensor(0.3))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights[0], weights[1], atol=1e-10, rtol=0)
    torch.testing.assert_close(bias[0], bias[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_state_dict_resumes_bit_for_bit(dtype, stop):
    """Through torch.save with weights_only, before, at and after a refresh, and without a cast of integers."""
    runs = []
    for interrupted in (False, True):
        weights = [torch.nn.Parameter(matrix(shape, dtype=dtype)) for shape in ((6, 5), (3, 7))]
        bias = torch.nn.Parameter(matrix((5,), dtype=dtype))
        optimizer = build(weights[0], [bias])
        optimizer.add_param_group({"params": [weights[1]], "rank": 2, "update_proj_gap": 3, "proj_type": "full"})
        train(optimizer, [*weights, bias], 0, stop, dtype)
        if interrupted:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            fresh = build(weights[0], [bias])
            fresh.add_param_group({"params": [weights[1]], "rank": 2, "update_proj_gap": 3, "proj_type": "full"})
            fresh.load_state_dict(torch.load(file, weights_only=True))
            for param in (*weights, bias):
                for key, value in optimizer.state[param].items():
                    assert fresh.state[param][key].dtype == value.dtype, key
            optimizer = fresh
        train(optimizer, [*weights, bias], stop, 9, dtype)
        runs.append([*weights, bias])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_state_has_the_size_that_the_paper_says():
    """mr + 2nr numbers for an m x n weight with m <= n (GaLore, table 1), 2mn unprojected, and two counters."""
    m, n, r = 6, 10, 2
    weight, regular = torch.nn.Parameter(matrix((m, n))), torch.nn.Parameter(matrix((m, n)))
    optimizer = build(weight, [regular])

    def numbers(param):
        return sum(value.numel() for value in optimizer.state[param].values() if value.is_floating_point())

    assert numbers(weight) == m * r + 2 * n * r
    assert numbers(regular) == 2 * m * n


def test_ordinary_optimizer_ways():
    """A closure, a scheduler, and stepping without gradients."""
    weight = torch.nn.Parameter(matrix((6, 5)))
    optimizer = build(weight)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(20):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < losses[0]
    before = weight.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(before, weight)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rule": "adamax"}, "rule must be one of"),
        ({"params": [{"params": [torch.nn.Parameter(torch.zeros(3))], "rank": 1}]}, "must be a matrix"),
        (
            {"params": [{"params": [torch.nn.Parameter(torch.zeros(3, 3))], "rank": 1, "proj_type": "up"}]},
            "proj_type must be one of",
        ),
    ],
)
def test_wrong_use_is_refused(wrong, message):
    arguments = {"params": [torch.nn.Parameter(torch.zeros(3, 3))], **wrong}
    with pytest.raises(ValueError, match=message):
        LowRankOptimizer(arguments.pop("params"), **arguments)
