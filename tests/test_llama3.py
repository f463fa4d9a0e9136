"""Shapes as Llama 3 has them: grouped heads of their own size, a tied table, biases, scaled rotary embeddings, a large
vocabulary. What the program says of such a model is what it is, and every method trains it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import helpers
import pytest
import torch
import transformers
from conftest import write_blocks, write_model
from flips import METHODS
from launching import launch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_pretraining import export
from peft_pretraining.config import Config, ModelConfig
from peft_pretraining.data.blocks import TokenBlocks
from peft_pretraining.models import model_config
from peft_pretraining.models.llama import build_model
from peft_pretraining.models.loss import token_loss_sum
from peft_pretraining.models.model_config import parameter_count, read_model_json
from peft_pretraining.models.targets import DEFAULT_TARGETS, target_linears
from peft_pretraining.report import state_size
from peft_pretraining.report.footprint.planning import make_plan
from peft_pretraining.runtime.devices import DEVICES
from peft_pretraining.training.utilisation import flops_per_token

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 64, "max_position_embeddings": 64}  # fmt: skip
TIED = {**SIZES, "tie_word_embeddings": True, "rope_theta": 500_000.0}
SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {**TIED, "rope_scaling": {"rope_type": "llama3", **SCALING}}
BIASED = {**LLAMA3, "attention_bias": True, "mlp_bias": True}
SHAPES = {
    "llama3": LLAMA3,
    "biases": BIASED,
    "untied": {**LLAMA3, "tie_word_embeddings": False},
    "one key head": {**TIED, "num_key_value_heads": 1},
    "linear": {**TIED, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {**TIED, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3, transformers 5": {
        **SIZES,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **SCALING},
    },
}
TOKENS = torch.arange(48).reshape(2, 24) % 64
PUBLISHED = {"llama3_1b": 1_235_814_400, "llama3_8b": 8_030_261_248}
"""Weights of Llama-3.2-1B and Llama-3-8B."""


def read(tmp_path, shape):
    """The shape as a run has it, of a JSON file."""
    problems = []
    found = read_model_json(str(write_model(tmp_path / "llama.json", **shape)), "--model_config", problems)
    assert found is not None, problems
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers(name, tmp_path):
    shape = read(tmp_path, SHAPES[name])
    model = build_model(ModelConfig(dtype="float64"), shape, None, CPU, seed=1)
    reference = transformers.LlamaForCausalLM(LlamaConfig.from_json_file(tmp_path / "llama.json")).double()
    reference.load_state_dict(model.state_dict())
    reference.tie_weights()
    assert model(TOKENS).logits.equal(reference(TOKENS).logits)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert loaded(TOKENS).logits.equal(model(TOKENS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is shape.get("tie_word_embeddings", False)


def test_both_spellings_of_a_scaling_are_one_model(tmp_path):
    one, other = (read(tmp_path, SHAPES[name]) for name in ("llama3", "llama3, transformers 5"))
    assert model_config.differences(one, other) == []
    logits = [build_model(ModelConfig(), shape, None, CPU, seed=1)(TOKENS).logits for shape in (one, other)]
    assert torch.equal(*logits)
    unscaled = build_model(ModelConfig(), read(tmp_path, TIED), None, CPU, seed=1)(TOKENS).logits
    assert not torch.allclose(unscaled, logits[0], atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_said_of_a_model_is_what_is_built(name, tmp_path):
    """Weights, the matrices that methods act on, the FLOPs that MFU counts, and the plan's memory."""
    shape = read(tmp_path, SHAPES[name])
    model = build_model(ModelConfig(dtype="float32", attn_implementation="eager"), shape, None, CPU, seed=1)
    weights = sum(param.numel() for param in model.parameters())
    assert parameter_count(shape) == weights
    matrices = [tuple(layer.weight.shape) for layer in target_linears(model, DEFAULT_TARGETS).values()]
    assert [(rows, columns) for rows, columns, _ in state_size.matrices(shape)] == matrices
    with FlopCounterMode(display=False) as counter:
        token_loss_sum(model, {"input_ids": TOKENS}).backward()
    assert flops_per_token(model.config, TOKENS.shape[1]) * TOKENS.numel() == counter.get_total_flops()
    settings = {"batch_size": 2, "total_batch_size": 2, "max_length": 24, "precision": "fp32"}
    plan = make_plan(Config.from_settings(settings), shape, DEVICES["h100"], 1, search=False)
    held, buffers = (sum(-(-each.nbytes // 512) * 512 for each in of()) for of in (model.parameters, model.buffers))
    assert held <= plan.kinds[1].components["weights"] <= held + buffers  # by the allocator's blocks of 512 bytes


def test_a_json_that_leaves_sizes_out_has_those_of_transformers():
    assert next(state_size.matrices({})) == (4096, 4096, 32)
    assert len(list(state_size.matrices({"num_key_value_heads": 8}))) == 7 * 32


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    """Read as transformers reads them, which builds as many weights as were published."""
    path = helpers.PROJECT / "configs" / f"{name}.json"
    problems, warnings = [], []
    shape = read_model_json(str(path), "--model_config", problems, warnings)
    assert problems == warnings == [] and parameter_count(shape) == PUBLISHED[name]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(LlamaConfig.from_json_file(path))
    assert sum(param.numel() for param in model.parameters()) == PUBLISHED[name]


def test_the_tiny_shape_has_all_that_is_particular():
    shape = json.loads((helpers.PROJECT / "configs" / "llama3_tiny.json").read_text())
    assert shape["num_key_value_heads"] < shape["num_attention_heads"] and shape["tie_word_embeddings"]
    assert shape["head_dim"] != shape["hidden_size"] // shape["num_attention_heads"]
    assert shape["rope_scaling"]["rope_type"] == "llama3" and parameter_count(shape) < 3e6


# Runs.

REPRESENTATIVES = ("full_rank", "galore", "lora", "adam_mini", "muon")
"""Of the matrices alone, projected, with factors, by heads, by whole matrices."""
SHARED = (*REPRESENTATIVES, "switchlora", "soap", "apollo")
"""And those with more to share among devices: vectors that are exchanged, bases, scaled gradients."""
CASES = [name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    data = write_blocks(folder / "data", train=64, validation=4, block=16, vocabulary=32, eos_token_id=3)
    return {"model_config": write_model(folder / "llama.json", **BIASED), "dataset_path": data}


def command(inputs, save_dir, *more, **changes):
    settings = {
        **{**inputs, "save_dir": save_dir, "batch_size": 2, "gradient_accumulation": 2, "num_training_steps": 6},
        **{"warmup_steps": 1, "lr": 0.01, "eval_every": 3, "save_every": 6, "workers": 0, **changes},
    }
    return [*(part for name, value in settings.items() for part in (f"--{name}", str(value))), *map(str, more)]


@pytest.mark.parametrize("method", CASES)
def test_every_method_trains_resumes_and_exports_one(inputs, tmp_path, method):
    own = METHODS[method].split()
    assert helpers.run(command(inputs, tmp_path / "whole", *own, method=method)) == 0
    helpers.stop_after(4, command(inputs, tmp_path / "stopped", *own, method=method))
    assert helpers.run(command(inputs, tmp_path / "stopped", *own, "--autoresume", "True", method=method)) == 0
    helpers.assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    losses = [loss for _, loss in helpers.evaluations(tmp_path / "whole")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model_6")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = TokenBlocks(inputs["dataset_path"], "validation", 16).__getitems__(list(range(4)))
    assert model(**ids, labels=ids["input_ids"]).loss.item() == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.parametrize("method", ["galore", pytest.param("muon", marks=pytest.mark.slow)])
def test_per_layer_updates_know_a_tied_table(inputs, tmp_path, method):
    """It is used twice in a pass, and moves once: after its last gradient."""
    own = {"method": method, "clip_grad_norm": 0, "gradient_accumulation": 2, "dtype": "float64"}
    own |= {"rank": 4, "stagger_refresh": "False"} if method == "galore" else {}
    for name, per_layer in (("whole", "False"), ("layers", "True")):
        assert helpers.run(command(inputs, tmp_path / name, **own, per_layer=per_layer)) == 0
    one, other = (exported(tmp_path / name / "model_6") for name in ("whole", "layers"))
    assert one
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["galore", "lora"])
def test_a_rank_beyond_the_rows_of_keys_is_theirs(inputs, tmp_path, method):
    """Keys and values have 12 rows here, and the other matrices 16 at least."""
    assert helpers.run(command(inputs, tmp_path / "run", method=method, rank=14)) == 0
    assert len({loss for _, loss in helpers.evaluations(tmp_path / "run")}) == 3
    if method == "galore":
        bases = {name: value.shape for name, value in helpers.tensors(tmp_path / "run" / "model_6").items()}
        ranks = {min(size) for name, size in bases.items() if "basis" in name and "k_proj" in name}
        assert ranks == {12}, bases


def exported(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint's model has in transformers."""
    return {name: value for name, value in helpers.tensors(checkpoint).items() if name.startswith("exported.")}


@pytest.mark.slow
def test_two_devices_are_one(inputs, tmp_path):
    """DDP and FSDP2, documents kept apart; all runs of two devices by one launch."""
    settings = {"gradient_accumulation": 1, "dtype": "float64", "document_mask": "True"}
    runs = []
    for method in SHARED:
        own = METHODS[method].split()
        whole = command(inputs, tmp_path / method / "one", *own, **{**settings, "batch_size": 4}, method=method)
        assert helpers.run(whole) == 0
        for kind in ("ddp", "fsdp"):
            more = {**settings, "batch_size": 2, "method": method, "distributed_type": kind}
            runs.append({"argv": command(inputs, tmp_path / method / kind, *own, **more)})
    launch(tmp_path / "launched", 2, runs)
    for method in SHARED:
        one, *others = (exported(tmp_path / method / name / "model_6") for name in ("one", "ddp", "fsdp"))
        assert one
        for other in others:
            torch.testing.assert_close(other, one, rtol=0, atol=1e-10, msg=f"{method}: {{}}".format)


def test_an_adapter_of_a_tied_model_is_the_merged_model(inputs, tmp_path):
    peft = pytest.importorskip("peft")
    assert helpers.run(command(inputs, tmp_path / "run", method="lora", rank=4)) == 0
    assert export.main([str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    assert export.main([str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(adapted(TOKENS).logits, merged(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_rates_of_a_tied_table_are_the_heads(inputs, tmp_path, capsys):
    assert helpers.run(command(inputs, tmp_path / "run", "--head_lr", "0.02", "--embed_lr", "0.03")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "tied embedding" in line]
    assert len(said) == 1 and said[0].endswith("--embed_lr") and "--head_lr" not in said[0]


def test_a_vocabulary_of_128_thousand(inputs, tmp_path):
    """Ids beyond 16 bits, and the fused loss, whose blocks of logits have few rows then."""
    data = write_blocks(tmp_path / "data", train=4, validation=2, block=16, vocabulary=128_256, eos_token_id=128_001)
    model = write_model(tmp_path / "llama.json", **{**LLAMA3, "vocab_size": 128_256, "num_hidden_layers": 1})
    own = {"dataset_path": data, "model_config": model, "num_training_steps": 1, "gradient_accumulation": 1}
    for fused in ("on", "off"):
        assert helpers.run(command(inputs, tmp_path / fused, **own, fused_loss=fused, eval_every=1)) == 0
    one, other = (helpers.evaluations(tmp_path / name) for name in ("on", "off"))
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in other], rel=1e-5)
    shutil.rmtree(tmp_path / "on")
