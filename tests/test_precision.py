"""Precisions: what they keep in which dtype, what is refused, how runs go on in them, what is exported."""

from __future__ import annotations

import dataclasses

import helpers
import pytest
import torch
import yaml
from conftest import write_blocks, write_model
from transformers import AutoModelForCausalLM

from peft_pretraining.config import ModelConfig, Precision, PrecisionConfig, cli
from peft_pretraining.config.precision_config import resolve
from peft_pretraining.export import merged_model
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS
from peft_pretraining.models.llama import build_model
from peft_pretraining.optim.tensors.full_precision import full_float32_products
from peft_pretraining.report import compare
from peft_pretraining.training import device_settings

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 16}
GALORE = {"method": "galore", "rank": 4, "update_proj_gap": 3}
LORA = {"method": "lora", "rank": 4}
RUNS = {"full_rank": {"method": "full_rank"}, "galore": GALORE, "lora": LORA}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    write_blocks(folder / "data", train=64, validation=4, block=16, vocabulary=32)
    write_model(folder / "llama.json", vocab_size=32, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def words(inputs):
    def build_command(save_dir, **changes) -> list[str]:
        settings = {
            **{"model_config": inputs / "llama.json", "dataset_path": inputs / "data", "save_dir": save_dir},
            **{"batch_size": 2, "gradient_accumulation": 2, "lr": 0.01, "num_training_steps": 6, "warmup_steps": 1},
            **{"eval_every": 6, "save_every": 6, "workers": 0, **changes},
        }
        return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]

    return build_command


def loaded(words, tmp_path, **changes):
    return cli.load(words(tmp_path / "run", **changes), environ={})


def problem(words, tmp_path, **changes) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(words, tmp_path, **changes)
    (line,) = error.value.problems
    return line


def precision(name: str, **settings) -> Precision:
    return resolve(PrecisionConfig(name, **settings), "auto", "cpu")


# What is refused, and what is said.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "float32", "precision": "mixed"}, "--dtype float32 and --precision mixed contradict"),
        ({"dtype": "bf16", "precision": "bf16_sr"}, "--dtype bfloat16 and --precision bf16_sr contradict"),
        ({"precision": "bf16_sr", "optimizer": "adam_zero"}, "--optimizer adam_zero cannot round"),
        ({"precision": "bf16", "state_dtype": "float32", "optimizer": "adam_zero"}, "--state_dtype float32"),
        ({"precision": "bf16_sr", "state_dtype": "published"}, "--state_dtype published contradict"),
        ({"precision": "half"}, "--precision must be one of"),
    ],
)
def test_contradictions_are_refused_in_one_line(words, tmp_path, settings, said):
    assert said in problem(words, tmp_path, **settings)


def test_flash_attention_does_not_compute_in_float32(words, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    line = problem(words, tmp_path, attn_implementation="flash_attention_2", precision="fp32")
    assert "flash_attention_2 computes in bfloat16, not in fp32" in line


@pytest.mark.parametrize(
    ("dtype", "name"), [("bf16", "bf16"), ("bfloat16", "bf16"), ("fp32", "fp32"), ("fp64", "fp64")]
)
def test_dtype_means_a_precision(words, tmp_path, dtype, name):
    assert loaded(words, tmp_path, dtype=dtype).config.precision.precision == name


def test_what_nearest_rounding_costs_is_said(words, tmp_path):
    said = " ".join(loaded(words, tmp_path, precision="bf16", weight_decay=0.1, adam_beta2=0.999).warnings)
    assert "0.03 nats" in said and "second moments in bfloat16 never fall" in said and "--weight_decay 0.1" in said
    said = " ".join(loaded(words, tmp_path, precision="bf16", state_dtype="float32", weight_decay=0.3).warnings)
    assert "0.03 nats" in said and "never fall" not in said and "--weight_decay" not in said
    assert not any("precision" in line for line in loaded(words, tmp_path, precision="mixed").warnings)


@pytest.mark.parametrize("method", ["full_rank", "galore", "muon", "rmnp"])
def test_decay_that_bfloat16_weights_ignore_is_said(words, tmp_path, method):
    """Whose it is, and only where it is lost: muon's and rmnp's published 0.1 at 0.01 changes no bit."""

    def said(precision="bf16", lr=0.01, **changes) -> list[str]:
        changes = {**RUNS.get(method, {"method": method}), "precision": precision, "lr": lr, **changes}
        return [line for line in loaded(words, tmp_path, **changes).warnings if "do not decay" in line]

    (line,) = said(weight_decay=0.1)
    assert line.startswith("--weight_decay 0.1 at --lr 0.01 is less than half a rounding step")
    weight = torch.linspace(-3, 3, 99, dtype=torch.bfloat16)
    assert torch.equal((weight.float() * (1 - 0.01 * 0.1)).bfloat16(), weight)
    assert not said(weight_decay=0) and not said(weight_decay=0.2) and not said("bf16_sr", weight_decay=0.1)
    assert not said("mixed", weight_decay=0.1)
    (line,) = said(weight_decay=0.2, head_weight_decay=0.1)
    assert line.startswith("--head_weight_decay 0.1 at --lr 0.01 ")
    (line,) = said(weight_decay=0.2, adam_lr=0.001)
    assert line.startswith("--weight_decay 0.2 at --adam_lr 0.001 ")


@pytest.mark.parametrize("sums", ["weight", "int8"])
def test_settings_without_effect_are_named(words, tmp_path, sums):
    given = {"state_dtype": "weight", "matmul_precision": "high", "basis_dtype": "int8", "gradient_sum_dtype": sums}
    given["lean_layers"] = "off"
    said = loaded(words, tmp_path, precision="mixed", **given).warnings
    assert all(any(f"--{name}" in line and "effect" in line for line in said) for name in given)


# What is kept in which dtype.


@pytest.mark.parametrize("name", ["mixed", "bf16", "bf16_sr", "fp32", "fp64"])
@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_weights_and_products_have_the_dtypes_of_their_precision(name, more, tmp_path):
    shape = {**SHAPE, "num_attention_heads": 2, "vocab_size": 32, **more}
    settings = precision(name)
    drawn = build_model(ModelConfig(), shape, None, CPU, seed=1, precision=settings)
    drawn.save_pretrained(tmp_path)
    read = build_model(ModelConfig(), {}, str(tmp_path), CPU, precision=settings)
    ids = torch.arange(8)[None]
    for model in (drawn, read):
        for key, param in model.named_parameters():
            assert str(param.dtype) == f"torch.{settings.norm_dtype if 'norm' in key else settings.weight_dtype}", key
        logits = model(ids).logits
        assert str(logits.dtype) == f"torch.{settings.compute_dtype}"
        logits.float().sum().backward()
        assert all(param.grad.dtype == param.dtype for param in model.parameters())
    torch.testing.assert_close(drawn(ids).logits, read(ids).logits, rtol=0, atol=0)
    assert (drawn.lm_head.weight is drawn.model.embed_tokens.weight) == bool(more)


def test_mixed_and_rounded_weights_compute_alike():
    """Where the weights are the same numbers: activations are bfloat16 whatever weights are kept in."""
    shape = {**SHAPE, "num_attention_heads": 2, "vocab_size": 32}
    wide, narrow = (build_model(ModelConfig(), shape, None, CPU, 1, precision(name)) for name in ("mixed", "bf16_sr"))
    wide.load_state_dict(narrow.state_dict())
    ids = torch.arange(16).reshape(2, 8)
    ours, theirs = wide(ids).logits, narrow(ids).logits
    assert torch.equal(ours, theirs)
    for logits in (ours, theirs):
        logits.float().square().sum().backward()
    for (name, one), (_, other) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        if "embed" not in name:  # whose gradient adds up rows in the table's dtype
            assert torch.equal(one.grad.to(other.dtype), other.grad), name
    generated = wide.generate(ids[:, :3], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, narrow.generate(ids[:, :3], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("method", [{}, LORA])
def test_no_cast_weight_is_kept_for_the_backward_pass(words, tmp_path, method):
    """It would cost half of what float32 weights do."""
    kept = []

    def pack(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flags = {"batch_size": 3, "num_training_steps": 1, **method}  # activations of 48 tokens have other shapes
        assert helpers.run(words(tmp_path / "run", precision="mixed", **flags)) == 0
    assert kept
    assert not [shape for shape, dtype in kept if dtype == torch.bfloat16 and shape in ((32, 16), (16, 32))]


def test_checkpointed_activations_change_no_bit():
    shape = {**SHAPE, "num_attention_heads": 2, "vocab_size": 32}
    gradients = []
    for checkpointing in (False, True):
        model = build_model(
            ModelConfig(activation_checkpointing=checkpointing), shape, None, CPU, 1, precision("mixed")
        )
        model(torch.arange(8)[None]).logits.float().square().sum().backward()
        gradients.append([param.grad for param in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def exported_dtype(folder) -> torch.dtype:
    """Of the plain model that transformers reads from a run's last checkpoint."""
    return AutoModelForCausalLM.from_pretrained(folder / "model_6", dtype="auto").dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "bf16_sr"])
def test_every_method_trains_and_exports(words, tmp_path, name):
    for method, spec in METHODS.items():
        assert helpers.run(words(tmp_path / method, precision=name, **{"method": method, **spec.tiny})) == 0
        assert exported_dtype(tmp_path / method) == (torch.float32 if name == "mixed" else torch.bfloat16)
        saved = helpers.tensors(tmp_path / method / "model_6")
        norms = [value for key, value in saved.items() if key.endswith("norm.weight")]
        assert norms and all(value.dtype == torch.float32 and (value != 1).any() for value in norms)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_exports_keep_the_digits_of_norms(words, tmp_path, dtype):
    assert helpers.run(words(tmp_path / "run", precision="bf16_sr", **LORA)) == 0
    saved, model = helpers.tensors(tmp_path / "run" / "model_6"), merged_model(tmp_path / "run" / "model_6", dtype)
    for name, weight in model.state_dict().items():
        assert weight.dtype == (torch.float32 if "norm" in name or dtype else torch.bfloat16)
        if "norm" in name:
            assert torch.equal(weight, saved[f"model.{name}"])


# How runs go on.


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("name", ["mixed", "bf16_sr", pytest.param("bf16", marks=pytest.mark.slow)])
def test_stopping_and_going_on_changes_no_bit(words, tmp_path, name, method):
    """And the precision need not be given again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert helpers.run(words(whole, precision=name, **RUNS[method])) == 0
    helpers.stop_after(4, [*words(parts, precision=name, **RUNS[method]), *helpers.RESUME])
    assert helpers.run([*words(parts, **RUNS[method]), *helpers.RESUME]) == 0
    helpers.assert_same_run(parts, whole)
    assert yaml.safe_load((parts / "config.yaml").read_text())["settings"]["precision"] == name
    assert exported_dtype(parts) == (torch.float32 if name == "mixed" else torch.bfloat16)


@pytest.mark.parametrize("method", ["galore", "lora"])
def test_moments_in_8_bits_beside_rounded_weights_go_on(words, tmp_path, method):
    settings = {"precision": "bf16_sr", "optimizer": "adamw8bit", **RUNS[method]}
    assert helpers.run(words(tmp_path / "whole", **settings)) == 0
    helpers.stop_after(4, words(tmp_path / "parts", **settings))
    assert helpers.run([*words(tmp_path / "parts", **settings), *helpers.RESUME]) == 0
    helpers.assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def mixed_run(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert helpers.run(words(folder, precision="mixed")) == 0
    return folder


def test_sums_may_be_kept_otherwise_when_a_run_goes_on(words, tmp_path):
    begun = {"precision": "bf16_sr", "per_layer": True, "num_training_steps": 1, **GALORE}
    assert helpers.run(words(tmp_path / "run", gradient_sum_dtype="int8", **begun)) == 0
    for asked, kept in (({}, "int8"), ({"gradient_sum_dtype": "float32"}, "float32")):
        config = loaded(words, tmp_path, autoresume=True, **begun, **asked).config
        assert config.precision.gradient_sum_dtype == kept


@pytest.mark.parametrize("given", [{"precision": "fp32"}, {"dtype": "bfloat16"}])
def test_another_precision_than_the_run_began_with_is_refused(words, mixed_run, tmp_path, given):
    (name, value), *_ = given.items()
    for changes in ({"save_dir": mixed_run, "autoresume": True}, {"resume_from": mixed_run / "model_6"}):
        with pytest.raises(ConfigError) as error:
            cli.load(words(**{"save_dir": tmp_path / "new", **changes, **given}), environ={})
        (line,) = error.value.problems
        assert "begun with --precision mixed" in line and f"--{name} {value}" in line


def without_precision(folder, dtype: str) -> None:
    """As runs were recorded before there was a precision."""
    new = {field.name for field in dataclasses.fields(PrecisionConfig)}

    def older(settings):
        return {**{key: value for key, value in settings.items() if key not in new}, "dtype": dtype}

    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["settings"] = older(content["settings"])
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(("begun", "dtype"), [("bf16", "bfloat16"), ("bf16", "auto"), ("fp32", "auto")])
def test_older_runs_keep_what_they_were_trained_in(words, tmp_path, begun, dtype):
    """`auto` was bfloat16 on CUDA: the weights say which it was."""
    assert helpers.run(words(tmp_path / "run", precision=begun)) == 0
    without_precision(tmp_path / "run", dtype)
    config = loaded(words, tmp_path, autoresume=True, num_training_steps=8).config
    assert config.resolved_precision("cuda").name == begun
    assert config.resolved_precision("cuda").state_format == "published"
    assert config.precision.matmul_precision == "highest"  # there was no TF32
    assert helpers.run([*words(tmp_path / "run", num_training_steps=8), *helpers.RESUME]) == 0
    assert helpers.checkpoints(tmp_path / "run") == [6, 8]


def test_other_states_than_the_run_began_with_are_refused(words, tmp_path):
    assert helpers.run(words(tmp_path / "run", precision="bf16")) == 0
    assert "begun with --state_dtype published, not float32" in problem(
        words, tmp_path, precision="bf16", state_dtype="float32", autoresume=True
    )


# What is said, and TF32.


def test_the_report_says_in_what_runs_were_computed(words, mixed_run, tmp_path, capsys):
    assert helpers.run(words(tmp_path / "other", precision="fp32")) == 0
    capsys.readouterr()
    assert compare.main([str(mixed_run), str(tmp_path / "other")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("precision: ")]
    assert "(run, precision=mixed) mixed" in line and "(other, precision=fp32) fp32" in line
    assert compare.main([str(mixed_run)]) == 0
    assert "precision" not in capsys.readouterr().out


def test_bases_and_merges_are_multiplied_in_full_float32():
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_float32_products():
            assert matmul.fp32_precision == "ieee"
            with full_float32_products():
                pass
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32" and torch.get_float32_matmul_precision() == "high"
        with full_float32_products(wanted=False):
            assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("asked", [None, "highest", "high"])
def test_float32_products_on_cuda_are_in_tf32_by_default(words, tmp_path, monkeypatch, asked):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    config = loaded(words, tmp_path, precision="fp32", **({"matmul_precision": asked} if asked else {})).config
    device_settings.set_matmul_precision(config, torch.device("cuda"))
    device_settings.set_matmul_precision(config, CPU)
    assert chosen == [asked or "high"]
