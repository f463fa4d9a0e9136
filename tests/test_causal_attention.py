"""Attention that needs no mask: equal to transformers' own, and only where sequences begin at their first token."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from transformers import masking_utils

from peft_pretraining.config import ModelConfig
from peft_pretraining.models import loss as losses
from peft_pretraining.models.causal_attention import NAME, is_maskless, nothing_masked
from peft_pretraining.models.llama import build_model
from peft_pretraining.models.loss import IGNORED, token_loss_sum

CPU = torch.device("cpu")


def build(model_json, **settings):
    shape = json.loads(model_json.read_text()) | {"num_key_value_heads": settings.pop("kv_heads", 2)}
    return build_model(ModelConfig(**settings), shape, None, CPU, seed=3)


def transformers_own(model):
    """The same weights with transformers' attention."""
    other = copy.deepcopy(model)
    other.config._attn_implementation = "sdpa"
    return other


def documents(lengths=(7, 12, 1, 4)):
    """Short sequences, filled up behind their last token."""
    torch.manual_seed(0)
    ids = torch.randint(1, 128, (len(lengths), 12))
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, IGNORED)}


def on_a_device(monkeypatch):
    """As where a look at a mask is waited for."""
    monkeypatch.setattr(losses, "_mask", lambda model, batch: nothing_masked(CPU) if is_maskless(model) else None)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_blocks_are_what_they_were_bit_by_bit(model_json, kv_heads):
    model = build(model_json, kv_heads=kv_heads)
    other, batch = transformers_own(model), {"input_ids": documents()["input_ids"]}
    ours, theirs = token_loss_sum(model, batch), token_loss_sum(other, batch)
    assert is_maskless(model) and not is_maskless(other) and torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_padding_behind_the_text_needs_no_mask(model_json, monkeypatch):
    """Loss, gradients, and the logits of all real tokens, in float64."""
    model, batch = build(model_json, dtype="float64"), documents()
    other = transformers_own(model)
    theirs = token_loss_sum(other, batch)
    theirs.backward()
    on_a_device(monkeypatch)
    ours = token_loss_sum(model, batch)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)
    real = batch["attention_mask"].bool()
    expected = other(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
    found = model(batch["input_ids"], attention_mask=nothing_masked(CPU)).logits[real]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_on_the_cpu_short_sequences_keep_their_mask(model_json):
    model, batch = build(model_json), documents()
    assert torch.equal(token_loss_sum(model, batch), token_loss_sum(transformers_own(model), batch))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_looked_at(model_json, monkeypatch, checkpointing):
    """Neither position ids nor a padding mask, also where activations are computed again."""
    looked = []
    for name in ("find_packed_sequence_indices", "_ignore_causal_mask_sdpa"):
        monkeypatch.setattr(masking_utils, name, lambda *args, **kwargs: looked.append(args))
    model = build(model_json, activation_checkpointing=checkpointing)
    on_a_device(monkeypatch)
    token_loss_sum(model, documents()).backward()
    assert looked == []
    model(input_ids=documents()["input_ids"])
    assert looked


def test_other_masks_go_transformers_own_way(model_json):
    """Padding in front, and generation, in which keys come from a cache."""
    model = build(model_json).eval()
    other, ids = transformers_own(model), documents()["input_ids"][1:2].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert torch.equal(model(ids, attention_mask=mask).logits, other(ids, attention_mask=mask).logits)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), other.generate(ids, **settings))
    alone = model.generate(ids[:1, 5:], **{**settings, "attention_mask": mask[:1, 5:]})
    assert torch.equal(model.generate(ids, **settings)[0, 12:], alone[0, 7:])


def test_what_was_chosen_stays_and_nothing_is_exported(model_json, tmp_path):
    assert build(model_json, attn_implementation="eager").config._attn_implementation == "eager"
    model = build(model_json)
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    ids = documents()["input_ids"]
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
