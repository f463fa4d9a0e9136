"""Bases in 8 bits: what the codes keep, and that optimizers with them go on as with others."""

import pytest
import torch
from optimizer_kinds import backward, parameters, through_a_file, train, values
from per_layer_helpers import loss, setup

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim import LowRankOptimizer, PerLayerUpdates
from peft_pretraining.optim.basis.svd import random_stiefel
from peft_pretraining.optim.tensors.int8_blocks import dequantize, quantize, quantize_vectors, scales_shape
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, Projection

GROUP = {"rank": 3, "update_proj_gap": 4, "basis_dtype": "int8"}


def optimizer_of(params, **changes):
    return LowRankOptimizer([{"params": params[:2], **GROUP, **changes}, {"params": params[2:]}], lr=0.05)


@pytest.mark.parametrize("shape, dim", [((600, 3), 0), ((3, 600), 1), ((256, 2), 0), ((5, 7), 1), ((512,), 0)])
def test_codes_are_within_half_a_step(shape, dim):
    """Of the largest of each 256 in a row; the block at the end is shorter."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(values, dim)
    assert codes.dtype == torch.int8 and codes.shape == shape and scales.shape == scales_shape(values.shape, dim)
    back = dequantize(codes, scales, dim, torch.float64)
    steps = dequantize(torch.ones_like(codes), scales, dim, torch.float64)
    assert ((back - values).abs() <= steps * (0.5 + 1e-5)).all()
    largest = torch.cat([block.abs().amax(dim, keepdim=True) for block in values.split(256, dim)], dim)
    torch.testing.assert_close(scales * 127, largest)
    assert torch.equal(quantize(back, dim)[0], codes)


def test_rounding_with_noise_is_right_on_average():
    values, generator = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    total = torch.zeros_like(values)
    for _ in range(400):
        codes, scales = quantize(values, 0, torch.rand(values.shape, generator=generator))
        total += dequantize(codes, scales, 0, torch.float32)
    steps = dequantize(torch.ones_like(codes), scales, 0, torch.float32)
    assert ((total / 400 - values).abs() < 0.12 * steps).all()  # 4.8 standard deviations of the mean


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    values = torch.zeros(300, 2)
    values[270, 1] = value
    back = dequantize(*quantize(values, 0), 0, torch.float32)
    assert not back.isfinite().all() and back[:, 0].isfinite().all() and back[:256].isfinite().all()
    assert torch.equal(dequantize(*quantize(torch.zeros(9, 2), 0), 0, torch.float32), torch.zeros(9, 2))


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_vectors_keep_their_lengths_and_hold_nearly_as_much(side):
    basis = random_stiefel(700, 40, torch.Generator().manual_seed(0)).float()
    basis, dim = (basis, 0) if side == LEFT else (basis.T.contiguous(), 1)
    back = dequantize(*quantize_vectors(3 * basis, dim), dim, torch.float64)
    torch.testing.assert_close(back.norm(dim=dim), torch.full((40,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)
    inner = (back.T @ back if side == LEFT else back @ back.T) / 9
    assert (inner - torch.eye(40)).abs().max() < 1.5e-3


def test_the_basis_is_the_one_that_later_updates_read():
    """R of a refresh, too, is in the basis as 8 bits have it."""
    params = parameters(torch.float32)
    optimizer = optimizer_of(params)
    backward(params, 0)
    optimizer.project_gradients()
    projected = optimizer.projected[params[0]]
    ((side, new),) = projected.new_bases.items()
    low = projected.low_rank_grad.clone()
    optimizer.step()
    state, projection = optimizer.state[params[0]], optimizer.subspaces[params[0]].projection
    assert state[side].dtype == torch.int8 and state[f"{side}_scales"].dtype == torch.float32
    torch.testing.assert_close(projection.bases(state)[side], new, rtol=1e-6, atol=0)
    torch.testing.assert_close(projection.project(projection.bases(state), params[0].grad), low, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("working", [torch.float32, torch.bfloat16])
def test_a_refresh_projects_with_the_basis_that_it_keeps(working):
    """Read in bfloat16 and rounded to 8 bits once more, one number in twelve would be another."""
    projection = Projection((RIGHT,), 16, ShardInfo(torch.Size((600, 300))), torch.int8, working)
    basis = {RIGHT: random_stiefel(300, 16, torch.Generator().manual_seed(0)).T}
    read, state = projection.as_read(basis), projection.stored_bases(basis)
    state = {key: torch.zeros_like(kept) for key, kept in state.items()}
    projection.store(state, read)
    assert read[RIGHT].dtype == working and torch.equal(projection.bases(state)[RIGHT], read[RIGHT])


@pytest.mark.parametrize("rand_ratio", [None, 0.0])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_updates_stay_close_to_those_with_whole_bases(rand_ratio, proj_type):
    """With refreshes, rotated moments of random bases, and both sides."""
    ends = []
    for basis_dtype in ("int8", "auto"):
        params = parameters(torch.float32)
        changes = {"basis_dtype": basis_dtype, "rand_ratio": rand_ratio, "proj_type": proj_type}
        optimizer = LowRankOptimizer([{"params": params[:2], **GROUP, **changes}], rule="sgd", lr=0.1, momentum=0.9)
        start = values(params)
        train(optimizer, params, 0, 9)
        ends.append(values(params)[:2])
    for one, other, was in zip(*ends, start, strict=False):
        assert 0 < (one - other).norm() < 0.02 * (other - was).norm()


def test_the_bits_go_on_after_loading():
    params = parameters(torch.float32)
    optimizer = optimizer_of(params)
    train(optimizer, params, 0, 6)
    saved, at = through_a_file(optimizer.state_dict()), values(params)
    train(optimizer, params, 6, 10)
    others = parameters(torch.float32)
    with torch.no_grad():
        for param, value in zip(others, at, strict=True):
            param.copy_(value)
    fresh = optimizer_of(others)
    fresh.load_state_dict(saved)
    train(fresh, others, 6, 10)
    assert all(torch.equal(*pair) for pair in zip(values(params), values(others), strict=True))


def test_a_state_with_other_bases_is_refused():
    made = {}
    for basis_dtype in ("int8", "auto"):
        params = parameters(torch.float32)
        made[basis_dtype] = optimizer_of(params, basis_dtype=basis_dtype)
        train(made[basis_dtype], params, 0, 2)
    for one, other in (("int8", "auto"), ("auto", "int8")):
        with pytest.raises(ValueError, match=f"basis_dtype '{one}' instead of '{other}'"):
            made[other].load_state_dict(made[one].state_dict())
        older = made[one].state_dict()
        for group in older["param_groups"]:
            del group["basis_dtype"]  # unknown to older versions, whose bases are whole
        with pytest.raises(ValueError, match="state of another"):
            made[other].load_state_dict(older)


def test_what_does_not_go_with_8_bits_is_refused():
    params = parameters(torch.float32)
    with pytest.raises(ValueError, match="basis_dtype 'int8' does not go with basis 'onlinepca'"):
        optimizer_of(params, proj_type="continuous")
    with pytest.raises(ValueError, match="basis_dtype must be one of auto, float32, weight, int8, got 'int4'"):
        optimizer_of(params, basis_dtype="int4")


@pytest.mark.parametrize("basis_dtype, kept", [("auto", 2), ("weight", 2), ("float32", 4)])
def test_bases_are_kept_as_the_group_says(basis_dtype, kept):
    params = parameters(torch.bfloat16)
    optimizer = optimizer_of(params, basis_dtype=basis_dtype)
    train(optimizer, params, 0, 5)
    assert optimizer.state[params[0]][RIGHT].element_size() == kept
    assert all(param.isfinite().all() for param in params)


def test_the_state_counts_a_byte_and_a_scale_for_every_256():
    weight = torch.nn.Parameter(torch.zeros(700, 512))
    optimizer = LowRankOptimizer([{"params": [weight], "rank": 8, "basis_dtype": "int8"}])
    state = optimizer.state[weight]
    assert (state[RIGHT].nbytes, state[f"{RIGHT}_scales"].nbytes) == (8 * 512, 4 * 8 * 2)
    assert Projection.for_weight("std", 8, weight.shape).bases({RIGHT: weight})[RIGHT] is weight


def test_per_layer_updates_take_first_bases_back():
    model, optimizer = setup("adamw", basis_dtype="int8")
    updates = PerLayerUpdates(optimizer)
    start = {key: value.clone() for key, value in optimizer.state[model[2].weight].items()}
    for sizes in ((1.0, float("nan")), (1.0, 1.0)):
        updates.begin_update(0)
        for index, size in enumerate(sizes):
            updates.begin_micro_batch(index, 2)
            loss(model, index, size).backward()
        state = optimizer.state[model[2].weight]
        if size != size:
            assert all(torch.equal(state[key], start[key]) for key in start)
    assert state["left_basis"].any() and state["left_basis_scales"].all() and int(state["refreshes"]) == 1
