"""When bases change, what a bad gradient or a failing decomposition does to them, and what is reported of it."""

import copy
import itertools
import logging
import math

import pytest
import torch
from projection_helpers import build, matrix, parameter, set_gradients, train

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.basis.svd import SVD_METHODS
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, SIDES

bad_numbers = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def refreshes(optimizer, weight):
    return int(optimizer.state[weight]["refreshes"])


def refreshed_at(optimizer, weights, steps):
    """For each weight the updates at which its basis changed."""
    changed = [[] for _ in weights]
    for step in range(steps):
        before = [refreshes(optimizer, weight) for weight in weights]
        old = [optimizer.state[weight][RIGHT].clone() for weight in weights]
        train(optimizer, weights, step, step + 1)
        for index, weight in enumerate(weights):
            moved = not torch.equal(old[index], optimizer.state[weight][RIGHT])
            assert moved == (refreshes(optimizer, weight) == before[index] + 1)
            if moved:
                changed[index].append(step)
    return changed


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict()["state"])


def assert_same_state(optimizer, before):
    after = optimizer.state_dict()["state"]
    for index, state in before.items():
        for key, value in state.items():
            assert torch.equal(value, after[index][key]), key


@pytest.mark.parametrize("gap, expected", [(4, [0, 4, 8]), (1, list(range(10))), (0, [0]), (100, [0])])
@pytest.mark.parametrize("group", [{}, {"proj_type": "random"}, {"rand_ratio": 0.5, "num_training_steps": 10}],
                         ids=["galore", "random", "golore"])  # fmt: skip
def test_refreshes_fall_on_multiples_of_the_gap(gap, expected, group):
    weight = parameter((6, 5))
    assert refreshed_at(build(weight, update_proj_gap=gap, **group), [weight], 10) == [expected]


def test_golore_is_random_from_its_share_of_the_run_on():
    """A refresh at t is random iff t / num_training_steps >= rand_ratio; beyond 1 none is, also after the end."""
    weight = parameter((6, 5))
    for ratio, random in [(0.0, [0, 4, 8, 12]), (0.4, [4, 8, 12]), (0.41, [8, 12]), (1.0, [12]), (1.1, [])]:
        rule = build(weight, rand_ratio=ratio, num_training_steps=10).subspaces[weight].rule
        assert [step for step in (0, 4, 8, 12) if not rule.reads_gradient(step)] == random


@pytest.mark.parametrize("layers, gap", [(7, 3), (3, 7), (4, 4), (5, 1), (10, 4)])
def test_staggered_refreshes_spread_over_the_gap(layers, gap):
    """No update but the first pays for more than its share, and every layer has one refresh in a gap."""
    weights = [parameter((6, 5), seed) for seed in range(layers)]
    group = {"rank": 2, "update_proj_gap": gap, "stagger_refresh": True}
    changed = refreshed_at(LowRankOptimizer([{"params": weights, **group}]), weights, 4 * gap + 1)
    for steps in changed:
        assert steps[0] == 0
        assert all(b - a == gap for a, b in itertools.pairwise(steps[1:]))
        for start in range(1, 3 * gap + 1):
            assert sum(start <= step < start + gap for step in steps) == 1
    for step in range(1, 4 * gap + 1):
        assert sum(step in steps for steps in changed) <= math.ceil(layers / gap)


def test_a_refresh_that_is_not_committed_stays_due():
    weight, other = parameter((6, 5)), parameter((6, 5))
    optimizer = LowRankOptimizer([{"params": [weight, other], "rank": 2, "update_proj_gap": 4}])
    train(optimizer, [weight, other], 0, 4)
    before = snapshot(optimizer)
    optimizer.begin_update(4)
    set_gradients([weight, other], 4)
    other.grad[0, 0] = math.nan  # only one layer is bad, but the update is skipped as a whole
    optimizer.project_gradients()
    assert not torch.stack([grad.norm() for grad in optimizer.gradients()]).isfinite().all()
    optimizer.zero_grad()
    assert_same_state(optimizer, before)
    for step, last in [(5, 5), (7, 5), (8, 8)]:  # the late refresh does not move the next one
        optimizer.begin_update(step)
        train(optimizer, [weight, other], step, step + 1)
        assert [int(optimizer.state[param]["last_refresh"]) for param in (weight, other)] == [last, last]


@bad_numbers
@pytest.mark.parametrize("where", ["projected", "regular"])
@pytest.mark.parametrize("first", [0, 4, 5], ids=["at the first refresh", "at a refresh", "between refreshes"])
@pytest.mark.parametrize("proj_type", ["std", "full", "random", "continuous"])
def test_library_use_skips_an_update_with_a_bad_gradient(bad, where, first, proj_type, caplog):
    """As a whole, with no trace but a warning, and the same update is made with the next gradients."""
    runs = []
    for interrupted in (False, True):
        weights = [parameter((6, 5)), parameter((5, 8), 1), parameter((5,), 2)]
        group = {"params": weights[:2], "rank": 2, "update_proj_gap": 4, "proj_type": proj_type}
        optimizer = LowRankOptimizer([{"params": weights[2:]}, group], lr=0.01, weight_decay=0.1)
        train(optimizer, weights, 0, first)
        if interrupted:
            before, values = snapshot(optimizer), [weight.detach().clone() for weight in weights]
            set_gradients(weights, 99)
            (weights[1] if where == "projected" else weights[2]).grad.view(-1)[3] = bad
            with caplog.at_level(logging.WARNING, "peft_pretraining"):
                optimizer.step()
            assert "skipped an update: a gradient is not finite" in caplog.text
            assert_same_state(optimizer, before)
            assert all(torch.equal(*pair) for pair in zip(values, weights, strict=True))
            assert not optimizer.refresh_metrics
            optimizer.zero_grad()
        train(optimizer, weights, first, 7)
        runs.append(weights)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


ROUTINES = {"exact": "svd", "gram": "eigh", "randomized": "qr"}


@pytest.fixture
def fail(monkeypatch):
    """A function that lets the next `times` calls of a routine of `torch.linalg` not converge."""

    def arrange(routine, times):
        real, left = getattr(torch.linalg, routine), [times]

        def failing(matrix, *args, **kwargs):
            if left[0]:
                left[0] -= 1
                raise torch.linalg.LinAlgError(f"{routine} did not converge")
            seen.append(matrix.dtype)
            return real(matrix, *args, **kwargs)

        seen = []
        monkeypatch.setattr(torch.linalg, routine, failing)
        return seen

    return arrange


@pytest.mark.parametrize("method", SVD_METHODS)
@pytest.mark.parametrize("side", ["std", "full"])
def test_a_failing_routine_is_retried_in_float64(method, side, fail):
    grads, bases = [matrix((6, 5), seed, torch.float32) for seed in range(2)], []
    for times in (0, 1):
        seen = fail(ROUTINES[method], times)
        weight = parameter((6, 5), dtype=torch.float32)
        optimizer = build(weight, proj_type=side, svd_method=method, update_proj_gap=1)
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
            assert "failed_refreshes" not in optimizer.refresh_metrics
            assert len(optimizer.refresh_metrics["captured_energy"]) == 1
        assert refreshes(optimizer, weight) == 2
        assert not times or seen[0] == torch.float64
        bases.append({which: optimizer.state[weight][which] for which in (LEFT, RIGHT) if side == "full"})
    if method != "randomized":  # whose sketch goes on after the failed call
        for which, basis in bases[0].items():
            torch.testing.assert_close(bases[1][which], basis, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", SVD_METHODS)
def test_where_every_routine_fails_the_old_basis_stays_until_a_gap_later(method, fail, caplog):
    weight = parameter((6, 5))
    optimizer = build(weight, svd_method=method)
    train(optimizer, [weight], 0, 4)
    old, values = optimizer.state[weight][RIGHT].clone(), weight.detach().clone()
    fail(ROUTINES[method], 2)
    with caplog.at_level(logging.WARNING, "peft_pretraining"):
        set_gradients([weight], 4)
        optimizer.step()
    assert "the basis of 0.0 could not be refreshed at update 4" in caplog.text
    assert len(optimizer.refresh_metrics["failed_refreshes"]) == 1
    assert "captured_energy" not in optimizer.refresh_metrics
    assert torch.equal(optimizer.state[weight][RIGHT], old)
    assert not torch.equal(weight, values)  # the update itself was made, in the old basis
    for step in range(5, 8):
        train(optimizer, [weight], step, step + 1)
        assert torch.equal(optimizer.state[weight][RIGHT], old) and not optimizer.refresh_metrics
    train(optimizer, [weight], 8, 9)
    assert refreshes(optimizer, weight) == 2 and "failed_refreshes" not in optimizer.refresh_metrics


@pytest.mark.parametrize("proj_type", ["std", "full", "continuous", "continuous_adam8bit"])
def test_a_first_refresh_that_fails_stays_due(proj_type, fail):
    """Without a basis to go on with, the next update tries again. Until then R = 0: nothing but the decay moves."""
    weight = parameter((6, 5))
    before = weight.detach().clone()
    optimizer = build(weight, proj_type=proj_type)
    fail("eigh", 4)
    for _ in range(2):
        set_gradients([weight], 0)
        optimizer.step()
        assert len(optimizer.refresh_metrics["failed_refreshes"]) == 1
    assert refreshes(optimizer, weight) == 0
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.1) ** 2)
    train(optimizer, [weight], 2, 3)
    assert refreshes(optimizer, weight) == 1 and int(optimizer.state[weight]["last_refresh"]) == 2
    basis = optimizer.state[weight][RIGHT]
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=basis.dtype))
    assert weight.isfinite().all()


def test_observed_gradients_make_the_basis_but_not_the_update():
    """The SVD sees the mean over them and the update's own, large-batch GaLore's refresh."""
    grads = [matrix((6, 5), seed) for seed in range(4)]
    weight, plain = parameter((6, 5)), parameter((6, 5))
    optimizer, reference = build(weight), build(plain)
    assert optimizer.some_refresh_reads_gradients()
    plain.grad = torch.stack(grads).mean(0)
    reference.step()
    expected = reference.state[plain][RIGHT]
    for grad in grads[:3]:
        weight.grad = grad.clone()
        optimizer.observe_gradients()
        optimizer.zero_grad()
    weight.grad = grads[3].clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight][RIGHT], expected)
    r = grads[3] @ expected.T
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.1 * r)
    energy = r.square().sum() / grads[3].square().sum()
    torch.testing.assert_close(optimizer.refresh_metrics["captured_energy"], [energy])
    assert not optimizer.some_refresh_reads_gradients()
    optimizer.observe_gradients()  # nothing between refreshes, and nothing lingers for the next one
    for step in range(1, 5):
        weight.grad, grad = matrix((6, 5), 50 + step), matrix((6, 5), 50 + step)
        optimizer.step()
    own = torch.linalg.svd(grad).Vh[:2]
    basis = optimizer.state[weight][RIGHT]
    torch.testing.assert_close(basis.T @ basis, own.T @ own)


@pytest.mark.parametrize("first", [0, 4])
def test_an_observed_gradient_that_is_not_finite_spoils_the_refresh_alone(first):
    """The update is made, in the old basis if there is one, and the next takes the refresh."""
    weight = parameter((6, 5))
    optimizer = build(weight)
    train(optimizer, [weight], 0, first)
    before = refreshes(optimizer, weight)
    weight.grad = torch.full_like(weight, math.nan)
    optimizer.observe_gradients()
    train(optimizer, [weight], first, first + 1)
    assert refreshes(optimizer, weight) == before and int(optimizer.state[weight]["step"]) == first + 1
    train(optimizer, [weight], first + 1, first + 2)
    assert refreshes(optimizer, weight) == before + 1 and weight.isfinite().all()


def test_random_bases_need_no_observed_gradients():
    assert not build(parameter((6, 5)), proj_type="random").some_refresh_reads_gradients()
    assert not build(parameter((6, 5)), rand_ratio=0.0).some_refresh_reads_gradients()


@pytest.mark.parametrize("side", SIDES)
def test_metrics_are_what_they_are_defined_as(side):
    """Captured energy ‖PPᵀG‖² / ‖G‖², overlap ‖P_newᵀ P_old‖² / r (for `full` the mean of both sides)."""
    weights = [parameter((8, 6)), parameter((5, 9), 1)]
    group = {"rank": 3, "update_proj_gap": 4, "proj_type": side}
    optimizer = LowRankOptimizer([{"params": weights, **group}])
    for step in range(5):
        bases = [{which: state[which].clone() for which in (LEFT, RIGHT) if which in state}
                 for state in (optimizer.state[weight] for weight in weights)]  # fmt: skip
        set_gradients(weights, step)
        optimizer.step()
        assert bool(optimizer.refresh_metrics) == (step in (0, 4))
        assert ("basis_overlap" in optimizer.refresh_metrics) == (step == 4)
    for index, (weight, old) in enumerate(zip(weights, bases, strict=True)):
        grad, kept, overlaps = weight.grad, weight.grad, []
        if LEFT in old:
            new = optimizer.state[weight][LEFT]
            kept = new @ new.T @ kept
            overlaps.append((new.T @ old[LEFT]).square().sum() / 3)
        if RIGHT in old:
            new = optimizer.state[weight][RIGHT]
            kept = kept @ new.T @ new
            overlaps.append((new @ old[RIGHT].T).square().sum() / 3)
        found = [float(optimizer.refresh_metrics[name][index]) for name in ("captured_energy", "basis_overlap")]
        assert found == pytest.approx(
            [float(kept.norm() ** 2 / grad.norm() ** 2), float(sum(overlaps)) / len(overlaps)]
        )


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e17])
def test_captured_energy_does_not_depend_on_the_gradients_size(size):
    weight = parameter((8, 6), dtype=torch.float32)
    optimizer = build(weight)
    weight.grad = matrix((8, 6), 1, torch.float32) * size
    optimizer.step()
    values = torch.linalg.svdvals(matrix((8, 6), 1, torch.float32)).square()
    (energy,) = optimizer.refresh_metrics["captured_energy"]
    assert float(energy) == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-5)
