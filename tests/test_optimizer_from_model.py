"""The projected optimizer for a whole model, in one line."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.config import Config
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.model_groups import TARGET_MODULES
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT


def llama(**changes):
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**{**shape, "num_attention_heads": 2, "max_position_embeddings": 16, **changes})
    return LlamaForCausalLM(config)


def test_a_models_attention_and_mlps_are_projected():
    """The layers that pre-training takes by default, with one line, and the same updates as groups made by hand."""
    model, other = llama(), llama()
    optimizer = LowRankOptimizer.from_model(model, rank=4, update_proj_gap=3, scale=0.25, lr=0.01, weight_decay=0.1)
    named = list(other.named_parameters())
    groups = [
        {"params": [entry for entry in named if "proj" not in entry[0]]},
        {"params": [entry for entry in named if "proj" in entry[0]], "rank": 4, "update_proj_gap": 3, "scale": 0.25},
    ]
    reference = LowRankOptimizer(groups, lr=0.01, weight_decay=0.1)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        group["param_names"] for group in reference.param_groups
    ]
    assert (
        tuple(Config.from_settings({"method": "galore"}).method.target_modules) == TARGET_MODULES
        and len(optimizer.subspaces) == 14
    )
    tokens = torch.arange(32).view(2, 16)
    for _ in range(4):
        for each, its in ((model, optimizer), (other, reference)):
            each(input_ids=tokens, labels=tokens).loss.backward()
            its.step()
            its.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


def test_layers_of_a_model_can_be_chosen():
    model = llama()
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(False)
    optimizer = LowRankOptimizer.from_model(
        model, rank=4, target_modules=["v_proj"], rule="lion", proj_type="full", rand_ratio=0.5, num_training_steps=9
    )
    (weight,) = optimizer.subspaces
    assert weight is model.model.layers[1].self_attn.v_proj.weight and set(optimizer.state[weight]) > {LEFT, RIGHT}
    assert optimizer.param_groups[1]["rand_ratio"] == 0.5 and optimizer.rule.name == "lion"
    assert len(optimizer.state) == len([param for param in model.parameters() if param.requires_grad])
    assert len(LowRankOptimizer.from_model(model, rank=4, target_modules="mlp").subspaces) == 6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["conv"]}, "conv.*no linear layer has such a name"),
        ({"target_modules": ["v_proj"]}, "target_modules v_proj: the weights of these layers are frozen"),
        ({"rank": 4.0}, "rank must be a whole number"),
        ({"scale": -1}, "scale must not be negative"),
    ],
)
def test_models_and_settings_that_do_not_fit_are_refused(settings, message):
    model = llama(num_hidden_layers=1)
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        LowRankOptimizer.from_model(model, **{"rank": 4, **settings})
