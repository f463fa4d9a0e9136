"""Head and loss in one: the numbers of the plain loss, in every place where it is used."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from conftest import write_blocks, write_model

from peft_pretraining.models import fused_loss
from peft_pretraining.models.fused_loss import fused_token_loss
from peft_pretraining.models.loss import IGNORED

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def plain(hidden, weight, labels):
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def inputs(dtype, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(weight_dtype or dtype).requires_grad_()
    labels = torch.randint(0, 50, (3, 11), generator=generator)
    labels[1, 4:] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients_are_those_of_the_plain_loss(dtype, rows, monkeypatch):
    monkeypatch.setattr(fused_loss, "_LOGITS_AT_ONCE", {"cpu": 50 * rows})
    results = []
    for loss in (plain, fused_token_loss):
        hidden, weight, labels = inputs(dtype)
        value = loss(hidden, weight, labels)
        (value / 7).backward()
        results.append([value.detach(), hidden.grad, weight.grad])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_a_wider_weight_has_a_gradient_of_its_own_width():
    """Of bf16 activations and a float32 head: it is no further from the exact gradient than the plain loss's."""
    exact = [each.detach().double().requires_grad_() for each in inputs(torch.bfloat16)[:2]]
    plain(*exact, inputs(torch.bfloat16)[2]).backward()
    errors = []
    for loss in (plain, fused_token_loss):
        hidden, weight, labels = inputs(torch.bfloat16, torch.float32)
        loss(hidden, weight, labels).backward()
        assert weight.grad.dtype == torch.float32
        errors.append((weight.grad - exact[1].grad).norm() / exact[1].grad.norm())
    assert errors[1] <= 1.02 * errors[0] < 0.05


def test_a_head_in_16_bits_is_multiplied_in_the_memory_of_its_gradient(monkeypatch):
    """For no more tokens than the width; of those blocks, too, that are shorter than others."""
    monkeypatch.setattr(fused_loss, "_LOGITS_AT_ONCE", {"cpu": 50 * 7})
    monkeypatch.setattr(fused_loss, "_PRODUCTS_AT_ONCE", 36 * 8)
    generator, results = torch.Generator().manual_seed(0), []
    values = [torch.randn(*shape, generator=generator).bfloat16() for shape in ((3, 11, 36), (50, 36))]
    for loss, dtype in ((plain, torch.float64), (plain, torch.bfloat16), (fused_token_loss, torch.bfloat16)):
        hidden, weight = (each.to(dtype, copy=True).requires_grad_() for each in values)
        if dtype == torch.bfloat16:
            assert fused_loss._sums_in_place(hidden.flatten(0, -2), weight)
        (loss(hidden, weight, inputs(dtype)[2]) / 7).backward()
        results.append([hidden.grad.double(), weight.grad.double()])
    for exact, theirs, ours in zip(*results, strict=True):
        assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() < 0.01 * exact.norm()


def test_nothing_to_predict_is_a_loss_of_zero_without_gradient():
    hidden, weight, labels = inputs(torch.float32)
    loss = fused_token_loss(hidden, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_without_gradients_it_is_the_same_loss():
    hidden, weight, labels = inputs(torch.float32)
    with torch.no_grad():
        assert torch.allclose(fused_token_loss(hidden, weight, labels), plain(hidden, weight, labels), rtol=1e-6)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = inputs(torch.float32)
    fused_token_loss(hidden, weight.requires_grad_(False), labels).backward()
    assert weight.grad is None and hidden.grad.any()


def test_infinite_logits_are_no_finite_loss():
    hidden, weight, labels = inputs(torch.float32)
    with torch.no_grad():
        hidden[0, 0] = torch.inf
    assert not fused_token_loss(hidden, weight, labels).isfinite()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    data = write_blocks(folder / "data", train=64, validation=8, block=16, vocabulary=32)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 16}
    model = write_model(folder / "llama.json", vocab_size=32, **shape)

    def flags(fused: str, more: str) -> list[str]:
        save_dir = folder / f"{fused} {more.replace('/', '_')}"
        common = (
            "--batch_size 4 --gradient_accumulation 2 --num_training_steps 6 --warmup_steps 1 --lr 0.01 --workers 0"
        )
        return [
            *("--model_config", str(model), "--dataset_path", str(data), "--save_dir", str(save_dir)),
            *("--fused_loss", fused, "--eval_every", "3", "--workers", "0", *common.split(), *more.split()),
        ]

    return flags


@pytest.mark.parametrize(
    "more",
    [
        "--method full_rank",
        "--method full_rank --activation_checkpointing True",
        "--method galore --rank 4 --update_proj_gap 3 --per_layer True --optimizer adamw",
        "--method relora --rank 4 --relora 3",
    ],
)
def test_a_run_has_the_losses_of_the_plain_one(more, command):
    numbers = []
    for fused in ("off", "on"):
        argv = command(fused, f"{more} --dtype float64")
        assert helpers.run(argv) == 0
        folder = Path(argv[argv.index("--save_dir") + 1])
        rows = [number for row in helpers.updates(folder) for number in row]
        losses = [loss for _, loss in helpers.evaluations(folder)]
        assert len(rows) == 6 * 4 and len(losses) == 3
        numbers.append(torch.tensor([*rows, *losses], dtype=torch.float64))
    torch.testing.assert_close(*numbers, rtol=1e-10, atol=0)
