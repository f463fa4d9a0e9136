"""The tokenizer beside an exported model: it adds nothing to a prompt, and its files serve other programs, too."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
from conftest import write_blocks
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, T5Tokenizer

from peft_pretraining.data.plain_text import PlainText
from peft_pretraining.data.prompt_tokenizer import SavedTokenizer, for_prompts, save_for_prompts
from peft_pretraining.data.tokenizer import load_tokenizer, train_tokenizer
from peft_pretraining.models.token_ids import adopt

WORDS = "the cat sat on a mat and the dog ran over hills while rain fell".split()
TEXT = "the cat ran over a mat </s> and sat"


def t5() -> T5Tokenizer:
    """Of T5's own class, which puts `</s>` behind every text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in dict.fromkeys(WORDS)] + [(letter, -6.0) for letter in "abcdefghi"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=["<extra_id_0>"], model_max_length=512)


def llama3() -> PreTrainedTokenizerFast:
    """As Llama 3's: byte-level BPE that begins every text, and has no padding."""
    rust = Tokenizer(models.BPE({"<b>": 0, "</s>": 1, "t": 2, "h": 3, "th": 4, "Ġ": 5}, [("t", "h")]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 0)])
    rust.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<b>", eos_token="</s>")


KINDS = {
    "t5": t5,
    "llama3": llama3,
    "trained": lambda: train_tokenizer([" ".join(WORDS)] * 9, 270, 1),
}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path) -> Path:
    """The folder of a tokenizer as its makers save it."""
    KINDS[request.param]().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_it_adds_nothing_to_a_prompt_and_changes_no_id(saved, tmp_path):
    (tmp_path / "out").mkdir()
    save_for_prompts(saved, tmp_path / "out", 64)
    before, after = load_tokenizer(str(saved)), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after(TEXT)["input_ids"] == before(TEXT, add_special_tokens=False)["input_ids"]
    assert list(PlainText(after)([TEXT])) == list(PlainText(before)([TEXT]))
    assert after.get_vocab() == before.get_vocab() and set(after.all_special_ids) == set(before.all_special_ids)
    assert (after.bos_token, after.eos_token, after.unk_token) == (before.bos_token, before.eos_token, before.unk_token)
    assert after.pad_token == before.pad_token or after.pad_token == after.eos_token
    assert after.model_max_length == 64
    assert after.decode(after("the cat")["input_ids"]) == before.decode(
        before("the cat", add_special_tokens=False)["input_ids"]
    )


def test_made_again_it_is_the_same(saved, tmp_path):
    once = SavedTokenizer.of(saved, 64)
    (tmp_path / "once").mkdir()
    once.write(tmp_path / "once")
    assert SavedTokenizer.of(tmp_path / "once", 64).files == once.files


def test_a_conversion_is_told_that_nothing_is_added(tmp_path):
    """llama.cpp puts a beginning before every text of a SentencePiece vocabulary unless something says no."""
    llama3().save_pretrained(tmp_path / "source")
    files = SavedTokenizer.of(tmp_path / "source", None).files
    described = json.loads(files["tokenizer_config.json"])
    assert described["add_bos_token"] is described["add_eos_token"] is False
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_sentencepiece_model_is_kept_under_both_names(tmp_path):
    t5().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "spiece.model").write_bytes(b"sentences")
    files = SavedTokenizer.of(tmp_path / "source", None).files
    assert files["spiece.model"] == files["tokenizer.model"] == b"sentences"


def test_one_whose_code_adds_tokens_is_named(caplog):
    tokenizer = for_prompts(ByT5Tokenizer(), 32)
    assert tokenizer.model_max_length == 32
    assert "ByT5Tokenizer): encode prompts with add_special_tokens=False" in caplog.text


@pytest.mark.parametrize("content", ["{", ""])
def test_what_cannot_be_read_is_kept_as_it_is(content, tmp_path, caplog):
    (tmp_path / "tokenizer.json").write_text(content)
    found = SavedTokenizer.of(tmp_path, 64)
    assert found == SavedTokenizer({"tokenizer.json": content.encode()}) and "cannot be read" in caplog.text


def test_a_folder_without_a_vocabulary_has_no_tokenizer(tmp_path, caplog):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert SavedTokenizer.of(tmp_path, 64) == SavedTokenizer({"tokenizer_config.json": b"{}"})
    assert SavedTokenizer.of("nobody/has-this", 64) == SavedTokenizer()
    assert "checkpoints will hold no tokenizer: nobody/has-this cannot be loaded" in caplog.text


def test_padding_with_the_end_freezes_no_row():
    """`LlamaModel` never trains the row of its `pad_token_id`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape))
    adopt(model, for_prompts(llama3(), 64), {})
    assert model.config.pad_token_id is None and model.config.eos_token_id == 1
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (1, 1)


def test_a_runs_checkpoint_goes_on_with_the_prompt(command, tmp_path):
    """Through transformers' own pipeline, from the folder of a checkpoint."""
    from transformers import pipeline

    data = write_blocks(tmp_path / "data", vocabulary=20)
    t5().save_pretrained(data)
    (data / "spiece.model").write_bytes(b"sentences")
    assert (
        helpers.run(command(dataset_path=data, num_training_steps=1, warmup_steps=0, save_every=1, eval_every=1)) == 0
    )
    checkpoint = tmp_path / "run" / "model_1"
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = tokenizer("the cat")["input_ids"]
    assert prompt == t5()("the cat", add_special_tokens=False)["input_ids"]
    assert tokenizer.model_max_length == 64 and (checkpoint / "tokenizer.model").read_bytes() == b"sentences"
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
    seen = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: seen.append(kwargs["input_ids"]) or forward(*args, **kwargs)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = generate("the cat", max_new_tokens=2, do_sample=False)
    assert seen[0].tolist() == [prompt] and answer["generated_text"].startswith("the cat")
