"""Rows of every option task, a small tokenizer and a small LLaMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS: dict[str, list[dict[str, Any]]] = {
    "WinoGrande": [
        {"sentence": "The rats fled the holes for the fields since the _ were crowded.", "option1": "holes",
         "option2": "fields", "answer": "1"},
        {"sentence": "The rats fled the holes for the fields since the _ were roomy.", "option1": "holes",
         "option2": "fields", "answer": "2"},
    ],
    "SST2": [{"sentence": "a warm film ", "label": 1}, {"sentence": "dull and long", "label": 0}],
    "RTE": [
        {"premise": "Ann met Bo.", "hypothesis": "Bo met Ann.", "label": 0},
        {"premise": "Ann slept.", "hypothesis": "Bo slept.", "label": "not_entailment"},
    ],
    "CB": [
        {"premise": "He said it rained.", "hypothesis": "it rained", "label": 2},
        {"premise": "It rained.", "hypothesis": "it rained", "label": 0},
        {"premise": "It never rained.", "hypothesis": "it rained", "label": 1},
    ],
    "BoolQ": [
        {"passage": "Ice melts at 0 C.", "question": "does ice melt", "label": 1},
        {"passage": "Ice melts.", "question": "Is ice hot?", "label": False},
    ],
    "WSC": [
        {"text": "Mark told Pete lies. He was sly.", "span1_text": "Mark", "span2_text": "He", "span1_index": 0,
         "span2_index": 4, "label": 1},
    ],
    "WIC": [{"word": "bank", "sentence1": "The bank lends.", "sentence2": "The bank is muddy.", "label": 0}],
    "MultiRC": [
        {"paragraph": "Bo ate figs.", "question": "What did Bo eat?", "answer": "figs", "label": 1},
        {"paragraph": "Bo ate figs.", "question": "What did Bo eat?", "answer": "peas", "label": 0},
    ],
    "Copa": [
        {"premise": "The man slipped.", "choice1": "The floor was wet.", "choice2": "I sang.", "question": "cause",
         "label": 0},
        {"premise": "The glass fell.", "choice1": "It flew.", "choice2": "It broke.", "question": "effect", "label": 1},
    ],
}  # fmt: skip
"""One or two rows of each task, in the hub's columns."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def winogrande_twins(count: int) -> list[dict[str, Any]]:
    """Twins that can be learnt: `big` goes with the first option, `small` with the second."""
    things = ["cup", "jar", "box", "bag", "pot", "can"]
    rows = []
    for number in range(count):
        one, two = things[number % 6], things[(number // 6 + number + 1) % 6]
        for word, answer in (("big", "1"), ("small", "2")):
            sentence = f"The {one} was larger than the {two} number {number} so the _ was {word}."
            rows.append({"sentence": sentence, "option1": one, "option2": two, "answer": answer})
    return rows


def bpe_tokenizer():
    """A byte-level BPE without a token at the beginning, such as this project trains."""
    from peft_pretraining.data.tokenizer import train_tokenizer

    texts = [str(value) for rows in ROWS.values() for row in rows for value in row.values()]
    texts += [row["sentence"] for row in winogrande_twins(12)]
    words = ["It was great. Yes No Maybe terrible Question: Is that correct? because so Suppose Does the word"]
    return train_tokenizer(texts + words * 20, 320, 1)


def sentencepiece_tokenizer():
    """As LLaMA's and T5's: spaces become a part of the next word, and every text begins with a token of its own."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "The rats fled holes fields were roomy crowded It was great terrible Yes No a warm film".split()
    letters = sorted({letter for letter in map(chr, range(33, 127))})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words] + [(word, -3.0) for word in words]
    pieces += [(letter, -6.0) for letter in letters if letter not in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_llama(vocabulary: int, seed: int = 0, **changes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, **{**shape, **changes})
    return LlamaForCausalLM(config)


def exact_llama(vocabulary: int, **changes):
    """The same in float64 throughout: transformers' norms compute in float32 whatever the model's dtype is."""
    from torch import nn

    model = tiny_llama(vocabulary, **changes).double().eval()
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, nn.RMSNorm(model.config.hidden_size, model.config.rms_norm_eps).double())
    model.model.norm = nn.RMSNorm(model.config.hidden_size, model.config.rms_norm_eps).double()
    return model


def save_tiny_model(folder: Path) -> Path:
    """A LLaMA of 30,000 weights with the BPE tokenizer."""
    tokenizer = bpe_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentiment_rows(count: int) -> list[dict[str, Any]]:
    """Rows of SST2 that one word tells apart, by which the model learns them quickly; of different lengths."""
    words = ["film", "warm", "long", "rats", "holes", "floor"]
    return [
        {"sentence": " ".join(["bad film", "fine film"][n % 2 : n % 2 + 1] + words[: n // 2 % 6]), "label": n % 2}
        for n in range(count)
    ]
