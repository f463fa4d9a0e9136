"""Text that spells a special token is ordinary text, whatever kind of tokenizer reads it."""

from __future__ import annotations

import pickle

import pytest
from streaming_helpers import made_up
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from peft_pretraining.data.plain_text import PlainText, plain_text_tokenizer, special_ids
from peft_pretraining.data.tokenizer import train_tokenizer

SPELLED = "It spells <extra_id_0> and </s> and <pad> inside, <unk>, too."
LETTERS = SPELLED.replace(" ", "▁")


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: the special tokens are pieces of the model itself, with the best scores of all."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -5.0) for letter in sorted(set(LETTERS))] + [("▁and", -4.0), ("spell", -4.5)]
    pieces += [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _wrapped(backend, extra_special_tokens=["<extra_id_0>", "<extra_id_1>"])


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama 2's: special tokens in the vocabulary, no pre-tokeniser; and here even merges that make one."""
    vocabulary = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>", "<pad>", *sorted(set(LETTERS))])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("a", "n"), ("an", "d")]
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    return _wrapped(backend)


def byte_level(ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's, or Llama 3's: special tokens added behind the vocabulary, and text tokens added behind those."""
    made = train_tokenizer(made_up(100), 300, 1)
    made.add_special_tokens({"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"})
    made.add_special_tokens({"extra_special_tokens": ["<extra_id_0>"]})
    made.add_tokens(["inside"])
    if ignore_merges:
        made.backend_tokenizer.model.ignore_merges = True
    return made


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's, where whole words are looked up: spelt alone, a special token is a word of the vocabulary."""
    words = ["<pad>", "<unk>", "</s>", "<extra_id_0>", "it", "spells", "and", "inside", "too", "<", ">", "/", "s"]
    words += ["pad", "extra", "_", "id", "0", ",", "."]
    backend = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(backend)


def _wrapped(backend: Tokenizer, **more) -> PreTrainedTokenizerFast:
    eos = backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", eos)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **more)


MAKERS = [unigram, sentencepiece_bpe, byte_level, lambda: byte_level(ignore_merges=True), wordpiece]
IDS = ["unigram", "sentencepiece_bpe", "byte_level", "ignore_merges", "wordpiece"]


@pytest.fixture(scope="module", params=MAKERS, ids=IDS)
def tokenizer(request):
    return request.param()


def test_no_special_token_comes_out_of_a_text_and_ordinary_tokens_stay(tokenizer):
    plain = PlainText(tokenizer)
    spelt, ordinary = plain([SPELLED, "and spells inside"])
    assert not special_ids(tokenizer) & set(spelt)
    assert ordinary == tokenizer("and spells inside", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", MAKERS[:4], ids=IDS[:4])
def test_no_character_is_lost(make):
    tokenizer = make()
    (ids,) = PlainText(tokenizer)([SPELLED])
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).strip() == SPELLED


def test_calls_of_the_copy_differ_in_nothing_else(tokenizer):
    copy = pickle.loads(pickle.dumps(plain_text_tokenizer(tokenizer)))
    options = {"padding": "max_length", "truncation": True, "max_length": 9}
    pairs = (["and spells", "it"], ["inside it", "s"])
    assert copy(*pairs, **options) == tokenizer(*pairs, **options)
    spelt = copy([SPELLED, "it"], padding=True)["input_ids"][0]
    ends = 0 if tokenizer.backend_tokenizer.num_special_tokens_to_add(False) == 0 else 1
    assert spelt.count(tokenizer.eos_token_id) == ends
    assert spelt[: len(spelt) - ends] == next(PlainText(tokenizer)([SPELLED]))
    assert (copy.pad_token_id, copy.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer(SPELLED)["input_ids"] != spelt  # the original is as it was


def test_tokens_of_a_single_character_remain_text():
    tokenizer = byte_level()
    tokenizer.pad_token = "!"
    (ids,) = PlainText(tokenizer)(["never! again"])
    assert tokenizer.decode(ids) == "never! again"


def test_tokenizers_in_python():
    tokenizer = ByT5Tokenizer()
    (ids,) = PlainText(tokenizer)([SPELLED])
    assert tokenizer.decode(ids) == SPELLED
    assert plain_text_tokenizer(tokenizer)(SPELLED)["input_ids"] == [*ids, tokenizer.eos_token_id]
