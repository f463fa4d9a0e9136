"""Adam-mini and SOAP: limits and zeros. Golden numbers: test_golden_more_methods.py."""

import pytest
import torch
from projection_helpers import matrix, parameter, set_gradients
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.methods.soap.method import first_bases
from peft_pretraining.optim import SOAP, AdamMini


@pytest.mark.parametrize(("blocks", "heads", "rows"), [("heads", 2, 3), ("heads", 6, 1), ("rows", None, 1)])
def test_a_block_has_one_second_moment(blocks, heads, rows):
    weight = parameter((6, 4))
    optimizer = AdamMini([weight], blocks=blocks, heads=heads)
    set_gradients([weight], 0)
    optimizer.step()
    expected = weight.grad.square().reshape(-1, rows * 4).mean(1) * 0.001
    torch.testing.assert_close(optimizer.state[weight]["block_mean_sq"], expected)


def test_adam_mini_knows_heads_of_queries_and_keys():
    """Heads need not be hidden size / number of heads rows, and keys may have fewer."""
    shape = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    config = LlamaConfig(**shape, vocab_size=32, num_attention_heads=6, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    optimizer = AdamMini.from_model(model, weight_decay=0.1)
    blocks = {name: len(optimizer.state[param]["block_mean_sq"]) for name, param in model.named_parameters()}
    layer = "model.layers.0."
    assert blocks[f"{layer}self_attn.q_proj.weight"] == 6 and blocks[f"{layer}self_attn.k_proj.weight"] == 2
    assert blocks[f"{layer}self_attn.v_proj.weight"] == 8 and blocks[f"{layer}mlp.up_proj.weight"] == 16
    assert blocks["lm_head.weight"] == blocks["model.embed_tokens.weight"] == 32 and blocks["model.norm.weight"] == 1
    decays = {optimizer.group_of(param)["weight_decay"] for name, param in model.named_parameters() if "norm" in name}
    assert decays == {0.0} and optimizer.group_of(model.lm_head.weight)["weight_decay"] == 0.1


@pytest.mark.parametrize("build", [AdamMini, lambda params: SOAP(params, gap=2, weight_decay=0)])
def test_zeros_move_nothing_and_spoil_nothing(build):
    weight = parameter((6, 4))
    optimizer = build([weight])
    for step in range(8):
        before = weight.detach().clone()
        set_gradients([weight], step)
        if step in (0, 4):
            weight.grad.zero_()
        optimizer.step()
        moved = (weight.detach() - before).norm()
        assert moved.isfinite() and (moved > 0) == (step != 0), step


def test_soaps_first_update_fills_the_gram_matrices_alone():
    weight = parameter((6, 4))
    start, optimizer = weight.detach().clone(), SOAP([weight], weight_decay=0.1)
    set_gradients([weight], 0)
    optimizer.step()
    state = optimizer.state[weight]
    assert torch.equal(weight, start) and not state["exp_avg_sq"].any()
    for side, gram in enumerate((weight.grad @ weight.grad.T, weight.grad.T @ weight.grad)):
        torch.testing.assert_close(state[f"gram_{side}"], 0.05 * gram)
        vectors = state[f"vectors_{side}"]
        rotated = vectors.T @ gram @ vectors
        torch.testing.assert_close(rotated, rotated.diagonal().diag(), atol=1e-12, rtol=0)
        assert (rotated.diagonal().diff() <= 1e-12).all()


def test_a_side_that_is_too_long_is_left_as_it_is():
    weight = parameter((12, 4))
    optimizer = SOAP([weight], gap=2, max_side=8)
    start = weight.detach().clone()
    for step in range(4):
        set_gradients([weight], step)
        optimizer.step()
    kept = {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    assert kept == {"exp_avg": (12, 4), "exp_avg_sq": (12, 4), "gram_1": (4, 4), "vectors_1": (4, 4)}
    assert (weight - start).abs().max() < 0.1


def test_without_bases_soap_is_adam_that_begins_one_update_later():
    weight, other = parameter((6, 4)), parameter((6, 4))
    soap = SOAP([weight], lr=0.01, max_side=0, weight_decay=0, betas=(0.9, 0.99), eps=1e-14)
    adam = torch.optim.Adam([other], lr=0.01, betas=(0.9, 0.99), eps=1e-14)
    for step in range(5):
        for each, optimizer in ((weight, soap), (other, adam)):
            set_gradients([each], step)
            if step or each is weight:
                optimizer.step()
        torch.testing.assert_close(weight, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("shape", "rank"), [((6, 4), 4), ((4, 6), 4), ((6, 5), 2), ((4, 3), 0)])
def test_first_bases_hardly_change_where_the_gradient_hardly_does(shape, rank):
    """Null spaces included."""
    grad = matrix((shape[0], rank)) @ matrix((rank, shape[1]), 1)
    near = grad * (1 + 1e-15 * matrix(shape, 2))
    for vectors, others in zip(first_bases(grad), first_bases(near), strict=True):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors), dtype=torch.float64))
        torch.testing.assert_close((vectors * others).sum(0).abs(), torch.ones(len(vectors), dtype=torch.float64))


def test_what_makes_no_sense_is_refused():
    weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="blocks must be one of heads, rows, tensor, got 'columns'"):
        AdamMini([weight], blocks="columns")
    with pytest.raises(ValueError, match="heads must be a positive number with blocks 'heads', got None"):
        AdamMini([weight], blocks="heads")
    with pytest.raises(ValueError, match="heads must divide the 4 rows of a parameter, got 3"):
        AdamMini([weight], blocks="heads", heads=3)
    with pytest.raises(ValueError, match="gap must be at least 0, got -1"):
        SOAP([weight], gap=-1)
