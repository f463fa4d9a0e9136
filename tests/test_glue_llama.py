"""Classifying with a LLaMA: the last real token is read, however the batch is padded."""

import pytest
import torch
from finetune_helpers import glue_flags, rows, run_glue, write_llama, write_rows

from peft_pretraining.finetune import glue
from peft_pretraining.finetune.glue_model import encoder, load_model, usable_length
from peft_pretraining.finetune.glue_settings import GlueSettings
from peft_pretraining.finetune.glue_tasks import GLUE_TASKS
from peft_pretraining.flags import ConfigError

TEXTS = ["w1", "w3 w9 w20 w7 w8", "w5 w6 w30", "w2 w2 w11 w12 w13 w14 w15 w16"]


def loaded(folder, **settings):
    torch.manual_seed(1)
    return load_model(GlueSettings(model_name_or_path=str(folder), **settings), GLUE_TASKS["sst2"])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad_token_id", [None, 0, -1])
def test_padding_changes_no_logit(side, pad_token_id, tmp_path):
    model, tokenizer = loaded(write_llama(tmp_path, side, pad_token_id=pad_token_id), use_llama=True)
    model = model.double().eval()
    assert (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 0, 1)
    together = tokenizer(TEXTS, padding=True, return_tensors="pt")
    widest = tokenizer(TEXTS, padding="max_length", max_length=40, return_tensors="pt")
    assert together["input_ids"].eq(0).any() and widest["input_ids"].shape[1] == 40
    # Padding on the left moves the text to other positions, whose rotations are float32 even in a float64 model.
    tolerance = 1e-9 if side == "right" else 1e-5
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer([text], return_tensors="pt")).logits for text in TEXTS])
        for batch in (together, widest):
            torch.testing.assert_close(model(**batch).logits, alone, rtol=tolerance, atol=tolerance)
        # And by hand: the head, on the last layer's state at the end of the text.
        for text, logits in zip(TEXTS, alone, strict=True):
            ids = tokenizer([text], return_tensors="pt")["input_ids"]
            assert ids[0, -1] == tokenizer.eos_token_id
            torch.testing.assert_close(model.score(model.model(ids).last_hidden_state[0, -1]), logits)


def test_every_row_of_the_embedding_trains(tmp_path):
    """A padding id of -1, as in older model files, would keep the last row from training."""
    model, _ = loaded(write_llama(tmp_path, pad_token_id=-1))
    assert model.get_input_embeddings().padding_idx == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_it_learns_and_gives_its_numbers_again(side, tmp_path):
    """Through a folder as pre-training writes it, with a method, and once more from the exported model."""
    llama = write_llama(tmp_path / "model_100", side, pad_token_id=-1)
    files = {
        "train_file": write_rows(tmp_path / "train.jsonl", rows("rte", 40, seed=1)),
        "validation_file": write_rows(tmp_path / "validation.jsonl", rows("rte", 20, seed=2)),
    }
    flags = {**files, "task_name": "rte", "eval_llama": True}
    trained = run_glue(
        **flags, model_name_or_path=llama, output_dir=tmp_path / "out", max_steps=60, learning_rate=5e-3,
        enable_golore=True, lora_all_modules=True, update_proj_gap=20,
    )  # fmt: skip
    assert trained["train_loss"] < 0.55 and trained["trainable_parameters"] < trained["parameters"]
    again = run_glue(**flags, model_name_or_path=tmp_path / "out", output_dir=tmp_path / "again", do_train=False)
    assert again["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-4)
    assert again["eval_accuracy"] == trained["eval_accuracy"]


def test_what_a_model_cannot_take(tmp_path):
    folder = write_llama(tmp_path / "llama", vocab_size=20)
    model, tokenizer = loaded(folder)
    encode = encoder(tokenizer, GLUE_TASKS["sst2"], 10, False, model.config.vocab_size)
    assert encode({"sentence": ["w3 w4"], "label": [1]})["input_ids"] == [[7, 8, 1]]
    with pytest.raises(ConfigError, match="token 43, but the model's table has 20 rows"):
        encode({"sentence": ["w39"], "label": [1]})
    settings = GlueSettings(model_name_or_path=str(folder), max_length=1000)
    assert usable_length(settings, model.config, tokenizer) == 64
    with pytest.raises(ConfigError, match="cannot be loaded"):
        loaded(tmp_path / "nothing")
    from finetune_helpers import write_bert

    with pytest.raises(ConfigError, match="of type bert"):
        loaded(write_bert(tmp_path / "bert"), use_llama=True)


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    """As Llama 2's: neither the end of the text nor what is pooled may be taken for padding."""
    from transformers import AutoTokenizer

    folder = write_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model, tokenizer = loaded(folder)
    assert tokenizer.pad_token == "<unk>" and model.config.pad_token_id == tokenizer.pad_token_id == 2


def test_lengths_of_an_encoder_that_counts_from_its_padding():
    from transformers import RobertaConfig

    class Tokenizer:
        model_max_length = 10**30

    settings = GlueSettings(max_length=600)
    config = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert usable_length(settings, config, Tokenizer()) == 512
    assert glue.parse(glue_flags(model_name_or_path="x", task_name="rte", output_dir="o")).task.max_length == 128
