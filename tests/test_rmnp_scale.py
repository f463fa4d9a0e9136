"""RMNP and SCALE: limits and zeros. Golden numbers: test_golden_more_methods.py."""

import pytest
import torch
from projection_helpers import parameter, set_gradients
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.optim import RMNP, Scale


def moved(optimizer, weight, step=0):
    before = weight.detach().clone()
    set_gradients([weight], step)
    optimizer.step()
    return weight.detach() - before


@pytest.mark.parametrize(("role", "dim"), [("hidden", 1), ("head", 1), ("embedding", 0)])
def test_every_output_unit_moves_as_far(role, dim):
    weight = parameter((7, 4))
    step = moved(Scale([weight], lr=0.01, role=role), weight)
    lengths = step.square().mean(dim).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01))


@pytest.mark.parametrize("build", [RMNP, lambda params, **own: Scale(params, role="head", **own), Scale])
def test_zeros_move_nothing_and_spoil_nothing(build):
    weight = parameter((6, 4))
    optimizer, start = build([weight], lr=0.01, weight_decay=0), weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, start)
    assert 0 < moved(optimizer, weight).norm() < 1


@pytest.mark.parametrize("tied", [False, True])
def test_scale_knows_head_and_embedding(tied):
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32, tie_word_embeddings=tied))
    optimizer = Scale.from_model(model, lr=1e-3, adam_lr=0.02)
    kept = {name: sorted(optimizer.state[param]) for name, param in model.named_parameters()}
    assert kept["model.embed_tokens.weight"] == (["exp_avg", "step"] if tied else ["step"])
    assert tied or kept["lm_head.weight"] == ["exp_avg", "step"]
    assert kept["model.layers.0.mlp.up_proj.weight"] == ["step"]
    assert kept["model.norm.weight"] == ["exp_avg", "exp_avg_sq", "step"]
    rates = {group["rule"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"adamw": 0.02, "scale": 1e-3}


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="role must be one of hidden, head, embedding, got 'norm'"):
        Scale([parameter((4, 4))], role="norm")
    with pytest.raises(ValueError, match="norm must be one of rms, l2, got 'max'"):
        Scale([parameter((4, 4))], norm="max")
