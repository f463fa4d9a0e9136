"""The names of target layers: each has to mean something, and nothing that is trained otherwise."""

import json

import pytest
import torch
from conftest import write_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_pretraining.config import Config, ModelConfig
from peft_pretraining.flags import ConfigError
from peft_pretraining.GoLore import ReLoRaModel
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.models import targets as targets_module
from peft_pretraining.models.llama import build_model
from peft_pretraining.models.targets import TargetError, target_linears
from peft_pretraining.nn import low_rank_layers
from peft_pretraining.optim.state.gradient_owner import gradient_owner

LOW_RANK = [name for name, entry in METHODS.items() if "target_modules" in entry.own]


def llama(tmp_path, **changes):
    shape = json.loads(write_model(tmp_path / "m.json", **changes).read_text())
    return build_model(ModelConfig(), shape, None, torch.device("cpu"), 0)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, attn_pdrop=0))


def start(method, model, *targets):
    """Convert a model and build the optimizer, as every entry point does."""
    config = Config.from_settings({"method": method, "rank": 2, "target_modules": targets, "relora": 5})
    made = load_method(method)(config)
    return made, made.build_optimizer(made.convert(model))


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize(
    "targets, words",
    [
        (("attn", "mpl"), "--target_modules attn,mpl: mpl: no linear layer has such a name; there are down_proj"),
        (("attn", "attention", "mpl"), "mpl: no linear layer"),
        (("norm",), "norm: no linear layer"),
        (("lm_head",), "lm_head: the weight of lm_head is also that of model.embed_tokens (tie_word_embeddings)"),
        (("mlp", "head"), "head: the weight of lm_head"),
    ],
)
def test_a_name_without_a_layer_of_its_own_is_refused(method, targets, words, tmp_path):
    with pytest.raises(ConfigError) as refused:
        start(method, llama(tmp_path, tie_word_embeddings=True), *targets)
    assert len(refused.value.problems) == 1 and words in refused.value.problems[0]


@pytest.mark.parametrize("targets", [("attn", "mpl"), ("lm_head",), (), ("",)])
def test_libraries_get_a_value_error_and_an_unchanged_model(targets, tmp_path):
    model = llama(tmp_path, tie_word_embeddings=True)
    before = str(model)
    for attempt in (lambda: target_linears(model, targets), lambda: ReLoRaModel(model, r=2, target_modules=targets)):
        with pytest.raises(TargetError) as refused:
            attempt()
        assert isinstance(refused.value, ValueError) and not isinstance(refused.value, ConfigError)
    assert str(model) == before


def test_names_for_one_thing_and_the_default_are_enough_in_part(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(targets_module.log, "warning", lambda text, *values: said.append(text % values))
    model = llama(tmp_path)
    assert len(target_linears(model, ("attn", "attention"))) == 8
    assert set(target_linears(model, "mlp")) == set(target_linears(model, ["mlp"]))  # one name, not its letters
    assert len(target_linears(model, ("attn", "attention", "mlp"))) == 14 and not said
    only = nn.ModuleDict({"mlp": nn.Linear(4, 4)})
    assert list(target_linears(only, ("attn", "attention", "mlp"))) == ["mlp"]
    assert "no linear layer is named attn, attention" in said[0]


def test_an_untied_head_is_a_target_like_any(tmp_path):
    assert list(target_linears(llama(tmp_path), ("lm_head",))) == ["lm_head"]
    _, optimizer = start("galore", llama(tmp_path), "lm_head")
    assert len(optimizer.subspaces) == 1


@pytest.mark.parametrize("method", LOW_RANK)
def test_gpt2s_layers_train_and_export_though_their_weights_are_stored_turned(method):
    """transformers' Conv1D holds Wᵀ: the function stays at first and is the exported one after an update."""
    model, batch = gpt2().eval(), torch.arange(12).reshape(2, 6)
    first = model(batch).logits.detach()
    made, optimizer = start(method, model, "attn", "mlp")
    torch.testing.assert_close(model(batch).logits, first, atol=1e-5, rtol=1e-5)
    gradients = gradient_owner(optimizer, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for step in range(3):
        gradients.begin_update(step)
        made.before_update(model, optimizer, step)
        gradients.begin_micro_batch(0, 1)
        model(batch, labels=batch).loss.backward()
        gradients.grad_norm()
        made.before_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    plain = gpt2().eval()
    plain.load_state_dict(made.merged_state_dict(model))
    torch.testing.assert_close(plain(batch).logits, model(batch).logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(plain(batch).logits, first)
    changed = [
        not torch.equal(a, b)
        for a, b in zip(plain.transformer.h.parameters(), gpt2().transformer.h.parameters(), strict=True)
    ]
    assert all(changed)
    if low_rank_layers(model):
        assert len(low_rank_layers(model)) == 8
    else:
        matrix = model.get_parameter("transformer.h.0.attn.c_attn.weight")
        assert len(optimizer.group_of(matrix)["params"]) == 8
        assert (matrix in optimizer.subspaces) == (
            "update_proj_gap" in METHODS[method].own and "rank" in METHODS[method].own
        )
