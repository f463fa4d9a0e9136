"""Where bases come from: singular vectors, random subspaces, and steps of online PCA."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import peak_bytes
from projection_helpers import RULES, build, matrix, parameter, train

from peft_pretraining.optim.basis import svd, svd_basis
from peft_pretraining.optim.basis.bases import GaussianBasis, RandomBasis, Refresh, SVDBasis, reconstruction_gradient
from peft_pretraining.optim.basis.svd import SVD_METHODS, squared_norm, top_singular_vectors, with_signs
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, SIDES, Projection

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
DTYPES = st.sampled_from([torch.float32, torch.float64])


def computed(rule, projection, grad, number=0, seed=0, name="layer.weight", old=None, step=0):
    """The bases that a rule computes at a refresh."""
    return rule.compute_basis(Refresh(step, number, seed, name, grad, projection, old or {}))


def assert_orthonormal(bases, rank, atol=1e-5):
    for side, basis in bases.items():
        columns = (basis if side == LEFT else basis.T).double()
        torch.testing.assert_close(columns.T @ columns, torch.eye(rank, dtype=torch.float64), atol=atol, rtol=0)


def energy(projection, bases, grad):
    """Share of the gradient that the subspaces hold: ‖R‖² / ‖G‖²."""
    kept = projection.project({side: basis.double() for side, basis in bases.items()}, grad.double())
    return float(kept.square().sum() / grad.double().square().sum())


def spectrum(shape, values, seed=0):
    """A matrix with given singular values and random singular vectors."""
    u, _, vt = torch.linalg.svd(matrix(shape, seed), full_matrices=False)
    return u * values @ vt


@given(shape=SHAPES, rank=st.integers(1, 14), side=st.sampled_from(SIDES), method=st.sampled_from(SVD_METHODS),
       seed=st.integers(0, 99), dtype=DTYPES)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True)
def test_bases_from_a_gradient_are_orthonormal_first_and_later(shape, rank, side, method, seed, dtype):
    projection = Projection.for_weight(side, rank, torch.Size(shape))
    rule, bases = SVDBasis(method), {}
    for number in range(3):
        bases = computed(rule, projection, matrix(shape, seed + number, dtype), number, old=bases)
        assert set(bases) == set(projection.sides)
        assert_orthonormal(bases, min(rank, *shape))


@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", [(50, 12), (12, 50)])
def test_blocks_of_rows_give_the_same_gram_matrix(monkeypatch, shape, side):
    """For 4, 3 and 1 rows at a time, of a bf16 gradient: as from all of them in float64."""
    grad, projection = matrix(shape).bfloat16(), Projection.for_weight(side, 5, torch.Size(shape))
    expected, square = computed(SVDBasis("gram"), projection, grad.double()), squared_norm(grad)
    for numbers in (48, 40, 1):
        monkeypatch.setattr(svd, "_NUMBERS_AT_ONCE", numbers)
        found = computed(SVDBasis("gram"), projection, grad)
        for each, basis in found.items():
            torch.testing.assert_close(basis, expected[each].float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(squared_norm(grad), square, rtol=1e-14, atol=0)


def test_eigenvectors_in_the_memory_of_the_gram_matrix():
    rows = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    gram = rows.T @ rows
    expected, where = svd._eigenvectors(gram, in_place=False), gram.data_ptr()
    found = svd._eigenvectors(gram, in_place=True)
    assert found.data_ptr() == where
    turned = found * (found * expected).sum(0).sign()
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(8192, 1024), (1024, 8192)])
def test_the_gram_matrix_takes_no_copy_of_the_gradient(monkeypatch, shape):
    """Beyond the matrix itself: the Gram matrix, which becomes its vectors, and one block of rows."""
    monkeypatch.setattr(svd, "_NUMBERS_AT_ONCE", 2**16)
    grad = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with peak_bytes() as peak:
        top_singular_vectors(grad, 256, ("right_basis" if shape[0] > 1024 else "left_basis",), "gram", {}, None)
    small = 8 * 1024 * 1024  # one matrix on the shorter side, in float64
    assert small <= peak.bytes <= 1.6 * small < 8 * grad.numel()


@given(shape=SHAPES, rank=st.integers(1, 14), side=st.sampled_from(SIDES), number=st.integers(0, 99),
       rule=st.sampled_from([RandomBasis, GaussianBasis]))  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_bases_are_orthonormal(shape, rank, side, number, rule):
    projection = Projection.for_weight(side, rank, torch.Size(shape))
    old = computed(rule(), projection, matrix(shape))
    assert_orthonormal(computed(rule(), projection, matrix(shape), number, old=old), min(rank, *shape))


@given(shape=SHAPES, rank=st.integers(1, 12), side=st.sampled_from(SIDES), method=st.sampled_from(["gram", "exact"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_singular_vectors_hold_as_much_of_the_gradient_as_any_subspace(shape, rank, side, method):
    """By Eckart and Young that is the r largest singular values, from either side or from both."""
    projection, grad = Projection.for_weight(side, rank, torch.Size(shape)), matrix(shape)
    bases = computed(SVDBasis(method), projection, grad)
    values = torch.linalg.svdvals(grad).square()
    assert math.isclose(energy(projection, bases, grad), values[: projection.rank].sum() / values.sum(), rel_tol=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(96, 40), (40, 96)])
@pytest.mark.parametrize("method, decay, share", [("gram", 0.0, 1 - 1e-6), ("gram", 3.0, 1 - 1e-6),
                                                  ("randomized", 0.0, 0.7), ("randomized", 1.0, 0.99)])  # fmt: skip
def test_fast_methods_capture_nearly_as_much_as_the_exact_one(side, shape, method, decay, share):
    """On a spectrum falling like i^-decay, cold and warm-started. A flat one (decay 0) has no leading subspace, which
    is the randomised method's worst case."""
    values = torch.arange(1, 41, dtype=torch.float64) ** -decay
    projection = Projection.for_weight(side, 8, torch.Size(shape))
    exact, fast, old = SVDBasis("exact"), SVDBasis(method), {}
    for number in range(3):
        # Gradients in training change slowly, and are noisy.
        grad = spectrum(shape, values).add_(matrix(shape, number), alpha=1e-3).float()
        best = energy(projection, computed(exact, projection, grad), grad)
        old = computed(fast, projection, grad, number, old=old)
        assert energy(projection, old, grad) >= share * best


def test_the_gram_matrix_sees_small_singular_values():
    """In float32 it would lose those below 1e-4 of the largest in the noise."""
    grad = spectrum((12, 8), torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0, 0], dtype=torch.float64)).float()
    projection = Projection.for_weight("full", 5, grad.shape)
    exact, gram = (computed(SVDBasis(method), projection, grad) for method in ("exact", "gram"))
    for side in (LEFT, RIGHT):
        torch.testing.assert_close(gram[side], exact[side], atol=2e-3, rtol=0)  # a float32 SVD is this good at 1e-4


@pytest.mark.parametrize("method", SVD_METHODS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("values", [[0.0] * 5, [1.0, 0, 0, 0, 0], [3.0, 2.0, 0, 0, 0]], ids=["zero", "one", "two"])
def test_rank_deficient_gradients_still_give_whole_bases(method, side, values):
    grad = spectrum((9, 5), torch.tensor(values, dtype=torch.float64)).float()
    projection, bases = Projection.for_weight(side, 3, grad.shape), {}
    for number in range(2):
        bases = computed(SVDBasis(method), projection, grad, number, old=bases)
        assert_orthonormal(bases, 3)
    if any(values):
        assert math.isclose(energy(projection, bases, grad), 1, rel_tol=1e-5)


@pytest.mark.parametrize("method", SVD_METHODS)
@pytest.mark.parametrize("side", SIDES)
def test_signs_follow_the_old_basis(method, side):
    """At first the largest entry of each vector is positive; later each vector turns to the old one of its index."""
    grad = spectrum((8, 6), torch.tensor([6.0, 5.0, 4.0, 0.3, 0.2, 0.1], dtype=torch.float64))
    rule, projection = SVDBasis(method), Projection.for_weight(side, 3, grad.shape)
    first = computed(rule, projection, grad)
    for which, basis in first.items():
        dim = 0 if which == LEFT else 1
        assert (basis.gather(dim, basis.abs().argmax(dim, keepdim=True)) > 0).all()
    turned = {which: -basis for which, basis in first.items()}  # against the convention of the first refresh
    later = computed(rule, projection, grad + 1e-3 * matrix((8, 6), 1), 1, old=turned)
    for which, basis in later.items():
        assert (basis * turned[which]).sum(0 if which == LEFT else 1).min() > 0.99


def test_signs_of_a_vector_at_right_angles_to_the_old_one_stay():
    vectors, old = torch.eye(3)[:, :2], torch.eye(3)[:, 1:]
    assert torch.equal(with_signs(vectors, old, dim=0), vectors)


def test_random_subspaces_are_uniform():
    """Over 2,000 draws the mean of PPᵀ is (r/m) I, each entry within 3 standard errors of the sample's, and P itself
    is as often one way as the other.

    21 entries and a fixed seed: a right generator with an unlucky seed would fail one time in 18. The entries of P,
    whose signs QR alone would leave lopsided, are held to the level at which the largest of 12 passes as often.
    """
    m, r, draws = 6, 2, 2000
    projection = Projection.for_weight("left", r, torch.Size((m, m)))
    bases = [computed(RandomBasis(), projection, matrix((m, m)), number)[LEFT] for number in range(draws)]
    bases = torch.stack(bases)
    projections = bases @ bases.mT  # (draws, m, m)
    error = (projections.mean(0) - torch.eye(m) * r / m) / (projections.std(0) / math.sqrt(draws))
    assert error.abs().max() <= 3
    # What the uniform distribution has on and off the diagonal (moments of Beta(r/2, (m-r)/2), and tr PPᵀ = r).
    variance = projections.var(0).flatten()
    on, off = 2 * r * (m - r) / (m**2 * (m + 2)), r * (m - r) / (m * (m - 1) * (m + 2))
    expected = torch.where(torch.eye(m).bool().flatten(), on, off)
    torch.testing.assert_close(variance, expected.double(), atol=0, rtol=0.15)
    largest = NormalDist().inv_cdf(1 - 0.0027 / 2 / (m * r))
    assert (bases.mean(0) * math.sqrt(draws * m)).abs().max() <= largest  # the variance of an entry is 1/m


@pytest.mark.parametrize("rule", [RandomBasis, GaussianBasis])
@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_random_bases_are_functions_of_seed_name_and_refresh_number(rule, side):
    projection = Projection.for_weight(side, 3, torch.Size((7, 9)))
    first = computed(rule(), projection, matrix((7, 9)), 2, 5, "a")
    again = computed(rule(), projection, 2 * matrix((7, 9), seed=1), 2, 5, "a", step=70)
    for which in first:
        if rule is RandomBasis:  # the other's signs depend on the old basis
            assert torch.equal(first[which], again[which])
    for other in ((3, 5, "a"), (2, 6, "a"), (2, 5, "b")):
        different = computed(rule(), projection, matrix((7, 9)), *other)
        assert all((first[which] - different[which]).abs().max() > 0.05 for which in first)
    if side == "full":
        assert (first[LEFT][:7, :3] - first[RIGHT][:, :7].T).abs().max() > 0.05


@given(shape=SHAPES, rank=st.integers(1, 6), side=st.sampled_from([LEFT, RIGHT]), seed=st.integers(0, 99),
       orthonormal=st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_closed_form_gradient_of_online_pca_is_autograds(shape, rank, side, seed, orthonormal):
    grad, length = matrix(shape, seed), shape[0] if side == LEFT else shape[1]
    start = matrix((length, min(rank, length)), seed + 1)
    start = torch.linalg.qr(start).Q if orthonormal else start
    basis = (start if side == LEFT else start.T).contiguous().requires_grad_()
    unit = grad / grad.norm()
    rebuilt = basis @ basis.T @ unit if side == LEFT else unit @ basis.T @ basis
    (expected,) = torch.autograd.grad((rebuilt - unit).square().sum(), basis)
    basis = basis.detach()
    low_rank = basis.T @ grad if side == LEFT else grad @ basis.T
    found = reconstruction_gradient(side, basis, grad, low_rank)
    torch.testing.assert_close(found, expected, atol=1e-11 * max(1, expected.abs().max().item()), rtol=1e-11)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e-12), (torch.float32, 1e18), (torch.bfloat16, 1e-12)])
@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_online_pca_does_not_depend_on_the_gradients_size(side, dtype, size):
    shape = (8, 6)
    grad, basis = matrix(shape, dtype=dtype), matrix((8, 3) if side == LEFT else (3, 6), 1, dtype) / 3
    low_rank = basis.T @ grad if side == LEFT else grad @ basis.T
    expected = reconstruction_gradient(side, basis, grad, low_rank)
    found = reconstruction_gradient(side, basis, grad * size, low_rank * size)
    assert expected.norm() > 0.1
    torch.testing.assert_close(found, expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.02)


@pytest.mark.parametrize("side", [LEFT, RIGHT])
@pytest.mark.parametrize("size", [0.0, 1e-21, 1e-40])
def test_online_pca_rests_at_a_zero_gradient(side, size):
    """Also where the gradient's square underflows: dividing by it would put infinities into the basis for good."""
    basis = matrix((8, 3) if side == LEFT else (3, 6), dtype=torch.float32)
    grad = size * matrix((8, 6), 1, torch.float32)
    low_rank = basis.T @ grad if side == LEFT else grad @ basis.T
    assert torch.equal(reconstruction_gradient(side, basis, grad, low_rank), torch.zeros_like(basis))


def carried(state, old, moment):
    """P_newᵀ P_old M Q_old Q_newᵀ, whichever sides there are."""
    if LEFT in old:
        moment = state[LEFT].T @ old[LEFT] @ moment
    return moment @ old[RIGHT] @ state[RIGHT].T if RIGHT in old else moment


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["adamw", "adafactor with beta1", "lion", "sgd"])
def test_golore_carries_the_momentum_into_the_new_basis(side, name):
    """In the state. A zero gradient adds nothing to it in the same update, so that only the usual decay remains."""
    weight, decay = parameter((7, 5)), {"lion": 0.99}.get(name, 0.9)
    optimizer = build(weight, proj_type=side, rand_ratio=0.0, **RULES[name])
    train(optimizer, [weight], 0, 4)
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state, key = optimizer.state[weight], optimizer.rule.first_moment
    assert int(state["refreshes"]) == 2
    old = {which: before[which] for which in (LEFT, RIGHT) if which in before}
    torch.testing.assert_close(state[key], decay * carried(state, old, before[key]), atol=1e-14, rtol=1e-12)
    for second in ("exp_avg_sq", "exp_avg_sq_row"):
        if second in state and name == "adamw":
            torch.testing.assert_close(state[second], 0.999 * before[second], atol=0, rtol=1e-12)  # not touched


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_golore_carries_8_bit_momentum(side):
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise

    code = create_dynamic_map(signed=True)

    def first_moment(state):
        moment = dequantize_blockwise(state["exp_avg"], absmax=state["exp_avg_absmax"], code=code, blocksize=256)
        return moment.T if side == "left" else moment  # kept with the rows that devices divide first

    weight = parameter((80, 72), dtype=torch.float32)
    optimizer = build(weight, proj_type=side, rule="adamw8bit", rank=64, rand_ratio=0.0)
    train(optimizer, [weight], 0, 4)
    old = {key: value.clone() for key, value in optimizer.state[weight].items()}
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    expected = 0.9 * carried(state, {key: old[key] for key in (LEFT, RIGHT) if key in old}, first_moment(old))
    # Rounded to the nearest of 256 values twice, when rotated and when updated.
    step = float(code.diff().max()) / 2 * float(expected.abs().max()) / 0.9
    torch.testing.assert_close(first_moment(state), expected, atol=2 * step, rtol=0)
    assert (first_moment(state) - 0.9 * first_moment(old)).abs().max() > 10 * step  # no rotation would show
    assert state["exp_avg"].dtype == torch.uint8


def test_galore_keeps_its_moments_at_a_refresh():
    weight = parameter((7, 5))
    optimizer = build(weight)
    train(optimizer, [weight], 0, 4)
    before = optimizer.state[weight]["exp_avg"].clone()
    weight.grad = 1e-20 * matrix((7, 5), 9)  # zeros would not make a basis
    optimizer.step()
    assert int(optimizer.state[weight]["refreshes"]) == 2
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.9 * before, atol=1e-14, rtol=0)


@pytest.mark.parametrize("side", SIDES)
def test_random_bases_are_the_same_from_any_number_of_threads(side, monkeypatch):
    monkeypatch.setattr(svd_basis, "_WORTH_THREADS", 0)
    shapes = [torch.Size(shape) for shape in ((12, 5), (5, 12), (7, 7), (9, 3))]
    refreshes = [
        Refresh(9, 2, 4, f"layer.{index}", torch.zeros(shape), Projection.for_weight(side, 3, shape), {})
        for index, shape in enumerate(shapes)
    ]
    rule, found = RandomBasis(), {}
    for threads in (1, 2, 3):
        monkeypatch.setattr(svd_basis, "share_of_cores", lambda threads=threads: threads)
        found[threads] = rule.compute_bases(refreshes)
    for index, refresh in enumerate(refreshes):
        expected = rule.compute_basis(refresh)
        for threads in found:
            assert found[threads][index].keys() == expected.keys()
            assert all(torch.equal(found[threads][index][key], expected[key]) for key in expected)
