"""Moments in 8 bits for the methods with factors: quantised along vectors, reset and pruned without touching others."""

import bitsandbytes.functional
import pytest
import torch
from torch import nn

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.rules.adamw import AdamW8bit
from peft_pretraining.optim.rules.columns import ColumnsAdamW8bit
from peft_pretraining.optim.state import state_reset
from peft_pretraining.optim.tensors import blockwise
from peft_pretraining.optim.vector_adamw import VectorAdamW
from peft_pretraining.optim.vector_adamw8bit import VectorAdamW8bit


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantized(state, key):
    moment = state[key]
    scales = state[f"{key}_absmax"]
    return blockwise.dequantize(moment, scales, blockwise.SIGNED[key])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 700), (4, 256), (2, 5), (1, 513)])
def test_quantising_loses_a_few_percent_of_each_number_and_no_zero(shape, signed):
    values = noise(*shape) if signed else noise(*shape).square()
    values[:, 1] = 0
    codes, scales = blockwise.quantize(values, signed)
    assert codes.shape == shape and scales.shape == (shape[0], -(-shape[1] // 256))
    back = blockwise.dequantize(codes, scales, signed)
    assert (back[:, 1] == 0).all() and (codes[:, 1] == blockwise.zero_code(signed)).all()
    block = scales.repeat_interleave(256, dim=1)[:, : shape[1]]
    assert ((back - values).abs() <= 0.5 * values.abs() + 0.02 * block)[:, 2:].all()
    large = values.abs() > 0.1 * block
    assert ((back - values).abs() / values.abs())[
        large
    ].max() < 0.9 / 64 / 2 / 0.1 + 1e-6  # 64 numbers between 0.1 and 1, evenly


@pytest.mark.parametrize("signed", [True, False])
def test_whole_blocks_are_bitsandbytes_own(signed):
    values = noise(2, 512).abs() if not signed else noise(2, 512)
    codes, scales = blockwise.quantize(values, signed)
    code = blockwise.quantization_map(signed, values.device)
    theirs, state = bitsandbytes.functional.quantize_blockwise(values, code=code, blocksize=256)
    assert torch.equal(scales.flatten(), state.absmax)
    assert (codes.int() - theirs.int()).abs().max() <= 1  # between two numbers that are equally far
    assert (codes == theirs).float().mean() > 0.99


@pytest.mark.parametrize("vectors", [0, 1, None])
def test_the_8_bit_rule_follows_the_one_in_float32(vectors):
    shape = (12, 700) if vectors != 1 else (700, 12)
    start = noise(*shape, seed=1)
    wide, narrow = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = [
        kind([{"params": [param], "vectors": vectors}], **settings)
        for kind, param in ((VectorAdamW, wide), (VectorAdamW8bit, narrow))
    ]
    index = torch.tensor([2, 5])
    for update in range(12):
        for optimizer, param in zip(optimizers, (wide, narrow), strict=True):
            param.grad = noise(*shape, seed=10 + update) + 0.3 * param.detach()
            if update == 6 and vectors is not None:
                optimizer.reset_vectors(param, index)
            optimizer.step()
    moved = (wide - start).norm()
    assert (wide - narrow).norm() < 0.03 * moved
    assert torch.equal(optimizers[0].state[wide]["step"], optimizers[1].state[narrow]["step"])
    assert optimizers[1].state[narrow]["exp_avg"].dtype == torch.uint8


def test_small_matrices_and_vectors_keep_float32_moments_and_the_same_bits():
    starts = [noise(8, 16), noise(5000)]
    trained = [[nn.Parameter(start.clone()) for start in starts] for _ in range(2)]
    for kind, params in zip((VectorAdamW, VectorAdamW8bit), trained, strict=True):
        optimizer = kind([{"params": params[:1], "vectors": 0}, {"params": params[1:]}], lr=0.1)
        for update in range(3):
            for param in params:
                param.grad = noise(*param.shape, seed=update)
            optimizer.step()
        assert all(optimizer.state[param]["exp_avg"].dtype == torch.float32 for param in params)
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


@pytest.mark.parametrize("vectors", [0, 1])
@pytest.mark.parametrize("counts", [True, False])
def test_a_reset_leaves_no_trace_in_other_vectors(vectors, counts):
    shape = (16, 300) if vectors == 0 else (300, 16)
    param = nn.Parameter(noise(*shape))
    optimizer = VectorAdamW8bit([{"params": [param], "vectors": vectors}], lr=0.01)
    param.grad = noise(*shape, seed=1)
    optimizer.step()
    state = optimizer.state[param]
    before = {key: value.clone() for key, value in state.items()}
    optimizer.reset_vectors(param, torch.tensor([3, 15]), counts)
    others = [row for row in range(16) if row not in (3, 15)]
    for key in state_reset.MOMENTS:
        assert (dequantized(state, key)[[3, 15]] == 0).all() and (dequantized(before, key)[[3, 15]] != 0).any()
        for name in (key, f"{key}_absmax"):
            assert torch.equal(state[name][others], before[name][others])
    expected = [0.0 if counts and row in (3, 15) else 1.0 for row in range(16)]
    assert state["step"].tolist() == expected


def relora_state():
    """The 8-bit state of an A (16, 320) after three updates, and its moments in float32."""
    param = nn.Parameter(noise(16, 320))
    optimizer = LowRankOptimizer([{"params": [param]}], rule=ColumnsAdamW8bit(torch_epsilon=True), lr=0.01)
    for update in range(3):
        param.grad = noise(16, 320, seed=update)
        optimizer.step()
    return optimizer.state[param]


def moment(state, key):
    codes = state[key]
    flat = blockwise.dequantize(codes.reshape(1, -1), state[f"{key}_absmax"].reshape(1, -1), blockwise.SIGNED[key])
    return flat.view(codes.shape)


def test_moments_in_8_bits_are_zeroed():
    state = relora_state()
    assert all((moment(state, key) != 0).any() for key in state_reset.MOMENTS)
    state_reset.zero_moments(state)
    assert all((moment(state, key) == 0).all() for key in state_reset.MOMENTS)


def test_pruning_in_8_bits_zeroes_entries_and_leaves_the_others_bit_by_bit():
    state = relora_state()
    before = {key: value.clone() for key, value in state.items()}
    state_reset.prune_randomly(state, 0.3, torch.Generator().manual_seed(5))
    chosen = torch.rand(before["exp_avg"].shape, generator=torch.Generator().manual_seed(5)) < 0.3
    for key in state_reset.MOMENTS:
        assert (moment(state, key)[chosen] == 0).all()
        assert torch.equal(state[key][~chosen], before[key][~chosen])
        assert torch.equal(state[f"{key}_absmax"], before[f"{key}_absmax"])


def test_pruning_by_magnitude_in_8_bits_keeps_the_larger_numbers():
    state = relora_state()
    before = {key: moment(state, key) for key in state_reset.MOMENTS}
    state_reset.prune_by_magnitude(state, 0.6)
    for key in state_reset.MOMENTS:
        magnitudes, after = before[key].abs(), moment(state, key)
        kept = magnitudes >= magnitudes.flatten().quantile(0.6, interpolation="higher")
        assert 0.39 < kept.float().mean() < 0.5
        assert torch.equal(after, torch.where(kept, before[key], 0.0))


def test_columns_are_the_transpose_of_rows():
    """So that a state fits any number of devices that divide a matrix by columns."""
    flat, upright = nn.Parameter(noise(12, 512)), nn.Parameter(noise(12, 512).T.contiguous())
    rules = (ColumnsAdamW8bit(torch_epsilon=True), AdamW8bit(torch_epsilon=True))
    for param, rule in zip((flat, upright), rules, strict=True):
        optimizer = LowRankOptimizer([{"params": [param]}], rule=rule, lr=0.01)
        for update in range(3):
            gradient = noise(12, 512, seed=update)
            param.grad = gradient if param is flat else gradient.T.contiguous()
            optimizer.step()
        assert optimizer.state[param]["exp_avg"].shape == (512, 12)
    assert torch.equal(flat, upright.T)
