"""Bases by subspace iteration: what they capture of any matrix, how they go on from the last ones, and over devices."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from projection_helpers import build, matrix, parameter

from peft_pretraining.config import Config, recorded
from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.basis import rows_with_energy, subspace_iteration
from peft_pretraining.optim.basis.basis_rule import Refresh
from peft_pretraining.optim.basis.subspace_iteration import cholesky_qr2, signed_qr
from peft_pretraining.optim.basis.svd_basis import SVDBasis
from peft_pretraining.optim.tensors.collectives import run
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, SIDES, Projection

SPECTRA = {
    "decaying": 0.8 ** torch.arange(24.0),
    "steep": 10.0 ** -torch.arange(24.0),
    "flat": torch.ones(24),
    "rank 3": (torch.arange(24) < 3).float(),
    "one and nothing": (torch.arange(24) < 1).float(),
    "zero": torch.zeros(24),
}
SHAPES = [(40, 24), (24, 40), (24, 24)]


def with_spectrum(shape, values, seed=0):
    """In float64."""
    left, right = (torch.linalg.qr(matrix((size, len(values)), seed + side))[0] for side, size in enumerate(shape))
    return (left * values.double()) @ right.T


def refresh_of(grad, side="std", rank=6, number=0, bases=None, shard=None, name="w"):
    projection = Projection.for_weight(side, rank, shard or grad.shape)
    return Refresh(0, number, 0, name, grad, projection, bases or projection.new_bases(grad))


def captured(grad, bases):
    """Share of the energy on the worst side."""
    grad = grad.double()
    parts = {LEFT: lambda basis: basis.double().T @ grad, RIGHT: lambda basis: grad @ basis.double().T}
    return min(float((parts[side](basis).norm() / grad.norm()) ** 2) for side, basis in bases.items())


def assert_orthonormal(bases, tolerance=1e-5):
    for side, basis in bases.items():
        inner = basis.T @ basis if side == LEFT else basis @ basis.T
        torch.testing.assert_close(inner, torch.eye(len(inner)).to(inner), atol=tolerance, rtol=0)


def compute(refreshes, method="subspace"):
    return run(SVDBasis(method).compute_bases(refreshes))


def in_turn(jobs):
    """What generators return that take part in the same collectives, which are carried out here."""
    found, asked = [], [next(job) for job in jobs]
    while not found:
        answers = []
        for of_one in zip(*asked, strict=True):
            assert len({(each.op, each.part.shape) for each in of_one}) == 1 and of_one[0].op == "sum"
            answers.append(sum(each.part for each in of_one))
        asked = []
        for job in jobs:
            try:
                asked.append(job.send([answer.clone() for answer in answers]))
            except StopIteration as end:
                found.append(end.value)
    return found


@pytest.fixture(params=["householder", "cholesky"])
def decomposition(request, monkeypatch):
    """That of the CPU, and that of other devices."""
    if request.param == "cholesky":
        monkeypatch.setattr(subspace_iteration, "signed_qr", cholesky_qr2)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bases_of_any_spectrum_capture_what_exact_ones_do(spectrum, side, dtype, decomposition):
    for seed, (shape, scale) in enumerate(zip(SHAPES, (1.0, 1e-20, 1e15), strict=True)):
        grad = (scale * with_spectrum(shape, SPECTRA[spectrum], seed)).to(dtype)
        first = refresh_of(grad, side)
        (cold,) = compute([first])
        later = (scale * with_spectrum(shape, SPECTRA[spectrum], seed)).to(dtype)
        later += 0.01 * later.norm() / later.numel() ** 0.5 * matrix(shape, seed + 9, dtype)
        (warm,) = compute([replace(first, grad=later, number=1, bases=cold)])
        for of, bases in ((grad, cold), (later, warm)):
            assert {basis.dtype for basis in bases.values()} == {dtype}
            assert_orthonormal(bases)
            if not of.any():
                continue
            (exact,) = compute([refresh_of(of, side)], "exact")
            # Singular values that the noise alone tells apart are no subspace: any captures nearly as much.
            least = 0.96 if spectrum == "flat" else 0.998
            assert captured(of, bases) >= least * captured(of, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 23, 24, 99])
def test_any_rank(shape, rank, decomposition):
    grad = with_spectrum(shape, SPECTRA["decaying"]).float()
    (bases,), (exact,) = compute([refresh_of(grad, rank=rank)]), compute([refresh_of(grad, rank=rank)], "exact")
    assert_orthonormal(bases)
    assert [basis.shape for basis in bases.values()] == [basis.shape for basis in exact.values()]
    assert captured(grad, bases) >= 0.998 * captured(grad, exact)


def test_where_there_is_no_energy_the_old_vectors_stay(decomposition):
    old = torch.linalg.qr(matrix((24, 6)))[0].T.float()
    grad = with_spectrum((40, 24), SPECTRA["rank 3"], seed=5).float()
    (new,) = compute([refresh_of(grad, number=1, bases={RIGHT: old})])
    assert captured(grad, new) > 0.9999
    _, _, kept = torch.linalg.svd(grad)
    rest = torch.eye(24) - kept[:3].T @ kept[:3]  # nothing but old vectors, in what the gradient leaves free
    inside = torch.linalg.qr((old @ rest).T)[0]
    outside = (new[RIGHT] @ rest) - (new[RIGHT] @ rest) @ inside @ inside.T
    assert outside.norm() < 0.1 * (new[RIGHT] @ rest).norm()  # what rounding leaves in S X, next to the share of X


def test_columns_keep_their_places_and_signs():
    """The moments stay as they are at a refresh, so a coordinate is to mean the same as before."""
    grad = with_spectrum((40, 24), 0.5 ** torch.arange(24.0)).float()
    (first,) = compute([refresh_of(grad)])
    for number in range(1, 4):
        (next_one,) = compute([refresh_of(grad, number=number, bases=first)])
        assert ((first[RIGHT] * next_one[RIGHT]).sum(1) > 0.9).all()
        first = next_one
    (exact,) = compute([refresh_of(grad, number=1, bases=first)], "exact")
    torch.testing.assert_close(first[RIGHT], exact[RIGHT], atol=1e-2, rtol=0)


def test_many_matrices_together_and_alone_are_the_same():
    grads = [matrix(shape, seed, torch.float32) for seed, shape in enumerate(2 * SHAPES)]
    refreshes = [refresh_of(grad, side) for grad, side in zip(grads, 2 * ["std", "full", "left"], strict=True)]
    for found, refresh in zip(compute(refreshes), refreshes, strict=True):
        (alone,) = compute([refresh])
        assert all(torch.equal(found[side], basis) for side, basis in alone.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_are_widened_by_blocks(dtype, monkeypatch):
    monkeypatch.setattr(subspace_iteration, "rows_at_once", lambda grad: 7)
    for shape in SHAPES:
        grad = matrix(shape, 3, torch.float32).to(dtype)
        for side in ("left", "right"):
            (narrow,), (wide,) = compute([refresh_of(grad, side)]), compute([refresh_of(grad.float(), side)])
            for which, basis in wide.items():
                torch.testing.assert_close(narrow[which], basis, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_devices_that_hold_parts_find_the_whole_ones_bases(shape, dim, side):
    """Three devices, the last with a smaller part, act in turn."""
    grads = [matrix(shape, seed) for seed in range(2)]
    parts = [torch.tensor_split(grad, [9, 18], dim) for grad in grads]
    jobs = []
    for place, offset in enumerate((0, 9, 18)):
        refreshes = []
        for seed, of in enumerate(parts):
            shard = ShardInfo(torch.Size(shape), dim, offset, of[place].shape[dim], dim)
            refreshes.append(refresh_of(of[place], side, shard=shard, name=str(seed)))
        jobs.append(SVDBasis("subspace").compute_bases(refreshes))
    found = in_turn(jobs)
    whole = compute([refresh_of(grad, side, name=str(seed)) for seed, grad in enumerate(grads)])
    for of_one in found:
        for mine, expected in zip(of_one, whole, strict=True):
            for which, basis in expected.items():
                torch.testing.assert_close(mine[which], basis, atol=1e-9, rtol=0)


def unequal_rows(shape, dim, seed=0):
    """Most of the energy in a third of the rows, or columns, and large enough to leave the others out."""
    sizes = torch.where(torch.arange(shape[dim]) % 3 == 0, 1.0, 0.05)
    return matrix(shape, seed) * (sizes[:, None] if dim == 0 else sizes)


@pytest.fixture
def weighed(monkeypatch):
    """Weighs the rows of small matrices, too, and notes which were left out."""
    monkeypatch.setattr(rows_with_energy, "_WORTH_SORTING", 0)
    kept, without = [], rows_with_energy._without

    def noting(each, few, squares):
        found = without(each, few, squares)
        kept.append(len(squares) if found[0] is None else len(found[0]))
        return found

    monkeypatch.setattr(rows_with_energy, "_without", noting)
    return kept


@pytest.mark.parametrize("shape, dim", [((60, 24), 0), ((24, 60), 1)])
@pytest.mark.parametrize("dtype, scale", [(torch.float64, 1.0), (torch.float32, 1e-22), (torch.bfloat16, 1e15)])
def test_rows_of_little_energy_are_left_out(shape, dim, dtype, scale, weighed):
    grad = (scale * (unequal_rows(shape, dim) + with_spectrum(shape, 5 * SPECTRA["decaying"]))).to(dtype)
    (cold,) = compute([refresh_of(grad)])
    (warm,) = compute([refresh_of(grad, number=1, bases=cold)])
    (exact,) = compute([refresh_of(grad)], "exact")
    assert min(weighed) < 60
    for bases in (cold, warm):
        assert captured(grad, bases) > (1 - rows_with_energy._NEGLIGIBLE[1]) * captured(grad, exact)
        assert_orthonormal(bases)


@pytest.mark.parametrize("dim", [0, 1])
def test_devices_leave_out_the_same_rows(dim, weighed):
    """Those that hold different rows of A, and those that hold different columns."""
    grad = unequal_rows((60, 24), 0)
    (first,) = compute([refresh_of(grad)])
    (whole,) = compute([refresh_of(grad, number=1, bases=first)])
    jobs, offset = [], 0
    for part in torch.tensor_split(grad, [9, 18], dim):
        shard = ShardInfo(grad.shape, dim, offset, part.shape[dim], dim)
        jobs.append(SVDBasis("subspace").compute_bases([refresh_of(part, shard=shard, number=1, bases=first)]))
        offset += part.shape[dim]
    for (of_one,) in in_turn(jobs):
        torch.testing.assert_close(of_one[RIGHT], whole[RIGHT], atol=1e-9, rtol=0)
    assert min(weighed) < 20


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_warm_basis_is_that_of_householder_rounds(rounds, monkeypatch):
    """Whether the bound ends the iteration after the first, by CholeskyQR, or a second begins from Nyström's factor."""
    grad = with_spectrum((40, 24), SPECTRA["decaying"])
    start = torch.linalg.qr(matrix((24, 6)))[0]
    monkeypatch.setattr(subspace_iteration, "_enough", lambda share, gained: rounds == 1)
    (found,) = compute([refresh_of(grad, number=1, bases={RIGHT: start.T})])
    gram, expected = grad.T @ grad / grad.norm() ** 2, start
    for number in range(rounds):
        shifted = gram
        if number:
            factor = torch.linalg.cholesky(start.T @ gram @ start)
            columns = gram @ start @ torch.linalg.inv(factor).T
            least = torch.linalg.cholesky(columns.T @ columns).diagonal().min() ** 2
            shifted = gram - least / 2 * torch.eye(24)
        expected = signed_qr((shifted @ expected)[None])[0][0]
    signs = (found[RIGHT].T * expected).sum(0).sign()
    torch.testing.assert_close(found[RIGHT].T, expected * signs, atol=1e-3, rtol=0)
    assert_orthonormal(found, 1e-12)


def test_what_cannot_be_decomposed_falls_back_on_the_gram_matrix(monkeypatch):
    """One matrix of many, as a device's Cholesky decomposition might leave it."""
    grads = [matrix((40, 24), seed, torch.float32) for seed in range(2)]
    whole = compute(list(map(refresh_of, grads)))
    calls = []

    def failing(products):
        q, r, failed = signed_qr(products)
        calls.append(products)
        return q, r, failed | (len(calls) == 1)

    monkeypatch.setattr(subspace_iteration, "signed_qr", failing)
    (first, second), (gram,) = compute(list(map(refresh_of, grads))), compute([refresh_of(grads[0])], "gram")
    assert torch.equal(first[RIGHT], gram[RIGHT]) and torch.equal(second[RIGHT], whole[1][RIGHT])


def test_a_failed_cholesky_decomposition_is_seen():
    singular = torch.zeros(2, 5, 3)
    singular[1] = matrix((5, 3), dtype=torch.float32)
    _, _, failed = cholesky_qr2(singular)
    assert failed.tolist() == [True, False]


def test_both_decompositions_agree():
    products = matrix((3, 30, 8), dtype=torch.float32) * 10.0 ** -torch.linspace(0, 5, 8)
    (q, r, _), (q2, r2, _) = signed_qr(products), cholesky_qr2(products)
    torch.testing.assert_close(q2.mT @ q2, torch.eye(8).expand(3, 8, 8), atol=1e-6, rtol=0)
    torch.testing.assert_close(q2, q, atol=1e-2, rtol=0)
    torch.testing.assert_close(r2, r, atol=1e-5, rtol=1e-3)


def test_auto_is_gram_for_small_matrices_and_iterates_over_others():
    for size, method in ((255, "gram"), (256, "subspace")):
        grad = matrix((size + 40, size), dtype=torch.float32)
        (auto,), (named,) = compute([refresh_of(grad)], "auto"), compute([refresh_of(grad)], method)
        assert torch.equal(auto[RIGHT], named[RIGHT])


def test_one_number_for_each_matrix_is_read_from_the_device(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    flat = [refresh_of(matrix((40, 24), seed, torch.float32)) for seed in range(5)]
    first = compute(flat)
    reads.clear()
    compute([replace(each, number=1, bases=bases) for each, bases in zip(flat, first, strict=True)])
    assert 1 <= len(reads) <= subspace_iteration.WARM_ROUNDS


@pytest.mark.parametrize("group", [{}, {"basis_dtype": "int8"}, {"proj_type": "continuous"},
                                   {"rand_ratio": 0.5, "num_training_steps": 8}], ids=str)  # fmt: skip
def test_every_rule_that_takes_bases_from_gradients_does(group):
    weight = parameter((40, 24), dtype=torch.float32)
    optimizer = build(weight, svd_method="subspace", rank=6, **group)
    grad, energies = with_spectrum((40, 24), SPECTRA["decaying"]).float(), []
    for _ in range(5):
        weight.grad = grad.clone()
        optimizer.step()
        energies += optimizer.refresh_metrics.get("captured_energy", [])
    assert energies[0] > 0.9
    if "rand_ratio" in group:
        assert energies[1] < 0.9  # random by then
    elif "proj_type" not in group:
        assert energies[1] > 0.9


@pytest.mark.parametrize("found", ["gram", "exact", None])
def test_a_run_that_goes_on_keeps_its_method(found, tmp_path):
    content = yaml.safe_load((Path(__file__).parent / "compat/runs/galore/config.yaml").read_text())
    content["settings"].pop("svd_method")
    if found:
        content["settings"]["svd_method"] = found
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    new = Config.from_settings({"method": "galore", "save_dir": str(tmp_path / "new"), "autoresume": True})
    old = new.replace(save_dir=str(tmp_path))
    assert recorded.keep(new, ()).method.svd_method == "auto"
    assert recorded.keep(old, ()).method.svd_method == (found or "gram")
    assert recorded.keep(old.replace(svd_method="subspace"), {"svd_method"}).method.svd_method == "subspace"
