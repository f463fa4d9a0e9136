"""Head and loss in one: the numbers of the plain loss, in every place where it is used."""

from __future__ import annotations

import sys
import types
from functools import partial
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from conftest import write_blocks, write_model

from peft_pretraining.config import ModelConfig
from peft_pretraining.flags import ConfigError
from peft_pretraining.models import compiled, fused_loss
from peft_pretraining.models.compiled import Compilation, CompiledFunction
from peft_pretraining.models.fused_loss import fused_token_loss, softmax_loss, softmax_loss_
from peft_pretraining.models.liger_loss import liger_loss
from peft_pretraining.models.llama import build_model
from peft_pretraining.models.loss import IGNORED
from peft_pretraining.training.build_model import choose_loss

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


@pytest.mark.parametrize("block_loss", [None, softmax_loss], ids=["eager", "for a compiler"])
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients_are_those_of_the_plain_loss(dtype, rows, block_loss, monkeypatch):
    monkeypatch.setattr(fused_loss, "_LOGITS_AT_ONCE", {"cpu": 50 * rows})
    results = []
    for loss in (plain, partial(fused_token_loss, block_loss=block_loss)):
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


def test_compiled_blocks_have_one_size(monkeypatch):
    """Where the rows can be divided so; else the last block alone is smaller, and made eagerly."""
    monkeypatch.setattr(fused_loss, "_LOGITS_AT_ONCE", {"cpu": 50 * 12})
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    results, compilation = [], Compilation()
    block_loss = CompiledFunction(softmax_loss, softmax_loss_, compilation)
    for loss in (plain, partial(fused_token_loss, block_loss=block_loss)):
        hidden, weight, labels = inputs(torch.float64)
        value = loss(hidden, weight, labels)
        value.backward()
        results.append([value.detach(), hidden.grad, weight.grad])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert compilation.compilations == 1  # of 33 rows, 3 x 11


@pytest.fixture
def liger(monkeypatch):
    """Stands for liger-kernel, whose class it has the signature of, and does what that says: the calls."""
    calls = []

    class Loss(torch.nn.Module):
        def __init__(
            self,
            ce_weight=None,
            ignore_index=-100,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="mean",
            softcap=None,
            return_z_loss=False,
            accum_dtype=None,
            use_token_scaling=False,
            return_token_accuracy=False,
        ):
            super().__init__()
            self.settings = {"ignore_index": ignore_index, "reduction": reduction, "accum_dtype": accum_dtype}

        def forward(self, lin_weight, _input, target, bias=None):
            assert _input.ndim == 2 and target.ndim == 1 and bias is None
            calls.append({**self.settings, "dtypes": (lin_weight.dtype, _input.dtype)})
            logits = _input @ lin_weight.t()  # as liger-kernel does it: under autocast, or with one dtype
            assert logits.dtype == _input.dtype
            return F.cross_entropy(logits.float(), target, ignore_index=self.settings["ignore_index"], reduction="sum")

    for name in ("liger_kernel", "liger_kernel.transformers", MODULE):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[MODULE], "LigerFusedLinearCrossEntropyLoss", Loss, raising=False)
    return calls


MODULE = "liger_kernel.transformers.fused_linear_cross_entropy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_kernel_is_called_as_it_wants(dtype, weight_dtype, liger):
    if torch.finfo(weight_dtype).bits < torch.finfo(dtype).bits:
        pytest.skip("weights are at least as wide as activations")
    results = []
    for loss in (plain, liger_loss()):
        hidden, weight, labels = inputs(dtype, weight_dtype)
        value = loss(hidden, weight, labels)
        (value / 7).backward()
        assert weight.grad.dtype == weight_dtype and hidden.grad.dtype == dtype and value.dtype == torch.float32
        results.append([value.detach(), hidden.grad, weight.grad])
    assert liger == [
        {"ignore_index": -100, "reduction": "sum", "accum_dtype": torch.float32, "dtypes": (weight_dtype, dtype)}
    ]
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def head(fused, compilation=None):
    """How a model makes its loss on CUDA."""
    model = build_model(
        ModelConfig(), {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, None, torch.device("meta")
    )
    choose_loss(model, fused, torch.device("cuda"), compilation)
    return model.head_loss_by if model.fused_loss else "plain"


def test_liger_kernel_makes_the_loss_of_eager_layers_where_it_is_installed(liger):
    assert [head(fused) for fused in ("auto", "liger", "on", "off")] == [
        *("liger-kernel", "liger-kernel", "blocks of logits", "plain")
    ]
    assert head("auto", Compilation()) == "compiled blocks of logits"  # which do not wait for the device


def test_a_liger_kernel_that_cannot_be_imported_is_named(monkeypatch, caplog):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("0 active drivers")

    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, MODULE, Broken(MODULE))
    assert liger_loss() is None
    assert "liger-kernel is installed, but cannot be imported: RuntimeError: 0 active drivers" in caplog.text


def test_without_liger_kernel_or_with_an_old_one_blocks_do(liger, monkeypatch):
    monkeypatch.setattr(sys.modules[MODULE].LigerFusedLinearCrossEntropyLoss, "__init__", lambda self, bias=None: None)
    assert liger_loss() is None and head("auto") == "blocks of logits"
    monkeypatch.setitem(sys.modules, MODULE, None)
    assert liger_loss() is None and head("auto") == "blocks of logits"
    with pytest.raises(ConfigError, match="--fused_loss liger needs CUDA and liger-kernel"):
        head("liger")


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
