"""Building models, their loss, and the layers that methods act on."""

import json
import math

import pytest
import torch
from conftest import write_model
from transformers import AutoModelForCausalLM

from peft_pretraining.config import Config, ModelConfig, config_flags
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.llama import build_model
from peft_pretraining.models.loss import IGNORED, count_targets, token_loss_sum
from peft_pretraining.models.targets import target_linears
from peft_pretraining.optim.state.gradient_owner import gradient_owner

CPU = torch.device("cpu")


def build(path, seed=0, **settings):
    shape = json.loads(path.read_text())
    if "max_sequence_length" in shape:
        shape["max_position_embeddings"] = shape.pop("max_sequence_length")
    return build_model(ModelConfig(**settings), shape, None, CPU, seed)


def gradient_of(model, row):
    """Gradient of the embedding's row `row` after a sequence that contains it."""
    token_loss_sum(model, {"input_ids": torch.tensor([[5, row, 9, row]])}).backward()
    return model.get_input_embeddings().weight.grad[row]


@pytest.mark.parametrize("pad_token_id, row", [(-1, 127), (0, 0), (None, 0)])
def test_no_embedding_row_is_frozen_or_zero(tmp_path, pad_token_id, row):
    model = build(write_model(tmp_path / "m.json", pad_token_id=pad_token_id))
    assert model.get_input_embeddings().weight[row].abs().max() > 0
    assert gradient_of(model, row).abs().max() > 0
    assert model.config.pad_token_id == (0 if pad_token_id == 0 else None)


def test_a_saved_padding_id_does_not_freeze_a_row_either(tmp_path):
    build(write_model(tmp_path / "m.json", pad_token_id=0)).save_pretrained(tmp_path / "saved")
    model = build_model(ModelConfig(), {}, str(tmp_path / "saved"), CPU, 0)
    assert gradient_of(model, 0).abs().max() > 0


def test_initial_weights_depend_on_the_seed_alone(model_json):
    first = build(model_json, seed=1).state_dict()
    torch.manual_seed(123)
    again = build(model_json, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = build(model_json, seed=2).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert abs(first["lm_head.weight"].std().item() - 0.02) < 0.001


def test_building_leaves_the_global_generator_alone(model_json):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build(model_json)
    assert torch.equal(torch.rand(1), expected)


def test_dtypes_are_rounded_from_the_same_draws(model_json):
    exact = build(model_json, dtype="float32").state_dict()
    rounded = build(model_json, dtype="bfloat16").state_dict()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert build(model_json).dtype == torch.float32  # auto, on the CPU


def test_flash_attention_is_refused_on_the_cpu(model_json):
    with pytest.raises(ConfigError, match="needs CUDA"):
        build(model_json, attn_implementation="flash_attention_2")


def test_activation_checkpointing_changes_no_gradient(model_json):
    batch = {"input_ids": torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))}
    gradients = []
    for checkpointing in (False, True):
        model = build(model_json, activation_checkpointing=checkpointing)
        token_loss_sum(model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_loss_is_transformers_own_times_the_number_of_targets(model_json):
    model = build(model_json)
    batch = {"input_ids": torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(0))}
    expected = model(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(token_loss_sum(model, batch) / count_targets(batch), expected)


def test_padding_counts_neither_in_the_loss_nor_in_the_attention(model_json):
    model = build(model_json).eval()
    short = {"input_ids": torch.randint(0, 128, (1, 10), generator=torch.Generator().manual_seed(0))}
    padded = {
        "input_ids": torch.cat([short["input_ids"], torch.full((1, 6), 7)], dim=1),
        "attention_mask": torch.tensor([[1] * 10 + [0] * 6]),
    }
    padded["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, IGNORED)
    assert count_targets(padded) == count_targets(short) == 9
    torch.testing.assert_close(token_loss_sum(model, padded), token_loss_sum(model, short))


def test_bfloat16_loss_is_computed_in_float32(model_json):
    model = build(model_json, dtype="bfloat16")
    loss = token_loss_sum(model, {"input_ids": torch.zeros(1, 16, dtype=torch.int64)})
    assert loss.dtype == torch.float32


def test_target_layers_are_attention_and_mlp(model_json):
    names = set(target_linears(build(model_json), ("attn", "attention", "mlp")))
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == {f"model.layers.{layer}.{name}" for layer in range(2) for name in layers}
    with pytest.raises(ValueError, match="no linear layer"):
        target_linears(build(model_json), ("convolution",))


def test_every_registered_method_is_a_training_method():
    known = {flag.name for flag in config_flags()}
    for name, entry in METHODS.items():
        assert issubclass(load_method(name), TrainingMethod)
        assert set(entry.own) <= known and set(entry.defaults) <= known


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_create_all_optimizer_state_at_once_and_export_what_they_train(name, model_json, tmp_path):
    method, model = load_method(name)(Config.from_settings({"method": name, "rank": 4})), build(model_json)
    model = method.convert(model)
    optimizer = method.build_optimizer(model)
    assert set(optimizer.state) == {param for param in model.parameters() if param.requires_grad}
    shapes = _lasting_state(optimizer)
    gradients = gradient_owner(optimizer, model)
    gradients.begin_update(0)
    method.before_update(model, optimizer, 0)
    token_loss_sum(model, {"input_ids": torch.arange(32).reshape(2, 16)}).backward()
    assert math.isfinite(gradients.grad_norm())
    method.before_step(model, optimizer, 0)
    optimizer.step()
    assert _lasting_state(optimizer) == shapes
    model.save_pretrained(tmp_path / "saved", state_dict=method.merged_state_dict(model))
    loaded, batch = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), torch.arange(16)[None]
    torch.testing.assert_close(loaded(batch).logits, model(batch).logits, atol=1e-6, rtol=0)


def _lasting_state(optimizer):
    """Shapes, without what a rule adds and deletes: FRUGAL's moments of the matrices that are inside."""
    rules = {param: optimizer.objects(param).rule for param in optimizer.state if hasattr(optimizer, "objects")}
    return {
        param: {
            key: value.shape for key, value in state.items() if key not in getattr(rules.get(param), "intermittent", ())
        }
        for param, state in optimizer.state.items()
    }


def test_galore_clips_by_the_norm_of_what_it_projects(model_json):
    """Norm over R of the projected weights and the full gradients of the rest; `full` over everything."""
    norms = {}
    for kind in ("projected", "full"):
        method, model = (
            load_method("galore")(Config.from_settings({"method": "galore", "rank": 4, "clip_norm": kind})),
            build(model_json),
        )
        optimizer = method.build_optimizer(model)
        optimizer.begin_update(0)
        token_loss_sum(model, {"input_ids": torch.arange(32).reshape(2, 16)}).backward()
        norms[kind] = optimizer.grad_norm()
        targets = {layer.weight for layer in target_linears(model, ("attn", "mlp")).values()}
        squares = [param.grad.square().sum() for param in model.parameters() if param not in targets]
        for param in targets:
            if kind == "full":
                squares.append(param.grad.square().sum())
            else:  # at a refresh R holds the top singular values
                squares.append(torch.linalg.svdvals(param.grad)[:4].square().sum())
        torch.testing.assert_close(norms[kind], torch.stack(squares).sum().sqrt())
        optimizer.scale_(torch.tensor(0.5))
        torch.testing.assert_close(
            torch.nn.utils.get_total_norm(optimizer.gradients()),
            norms["projected"] / 2,
        )
    assert norms["projected"] < norms["full"]
