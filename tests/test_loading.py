"""Saved weights are used as a whole or not at all, and exports have their tokenizer's ids of special tokens."""

import json
import pickle
from pathlib import Path

import helpers
import pytest
import torch
from conftest import write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM
from transformers import PreTrainedTokenizerFast as Tokenizer

from peft_pretraining.config import ModelConfig
from peft_pretraining.flags import ConfigError
from peft_pretraining.models.llama import build_model
from peft_pretraining.models.loading import check_is_llama, load_pretrained
from peft_pretraining.models.token_ids import adopt

CPU = torch.device("cpu")
TABLE = "model.embed_tokens.weight"


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model, its weights changed by `change`, and returns the folder."""

    def save(change=lambda weights: weights, **shape):
        settings = json.loads(write_model(tmp_path / "m.json", **shape).read_text())
        build_model(ModelConfig(), settings, None, CPU, 0).save_pretrained(tmp_path / "saved")
        file = tmp_path / "saved" / "model.safetensors"
        weights = change(load_file(file))
        save_file(weights, file, metadata={"format": "pt"})
        return tmp_path / "saved"

    return save


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def prefixed(weights):
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def replaced(tensor, name="lm_head.weight"):
    return lambda weights: {**weights, name: tensor}


DAMAGED = {
    "no head": (without("lm_head"), {}, "it lacks lm_head.weight, which would be drawn"),
    "no layer": (without("layers.1."), {}, "it lacks model.layers.1.input_layernorm.weight and 8 other weights"),
    "a prefix": (prefixed, {}, "it lacks lm_head.weight and 20 other weights"),
    "a further weight": (replaced(torch.ones(2), "more.weight"), {}, "it holds more.weight"),
    "another shape": (replaced(torch.ones(64, 32)), {}, "lm_head.weight has shape (64, 32)"),
    "integers": (replaced(torch.ones(128, 32, dtype=torch.int8)), {}, "lm_head.weight is saved as I8"),
    "not finite": (replaced(torch.full((128, 32), torch.nan)), {}, "lm_head.weight: not all numbers are finite"),
    "another head, tied": (replaced(torch.ones(128, 32)), {"tie_word_embeddings": True}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_weights_that_are_not_the_model_are_refused_by_name(case, saved):
    change, shape, words = DAMAGED[case]
    folder = saved(change, **shape)
    with pytest.raises(ConfigError, match="--warmed_up_model") as refused:
        build_model(ModelConfig(), {}, str(folder), CPU)
    assert words in refused.value.problems[0]


@pytest.mark.parametrize(
    "change, shape",
    [
        (without("lm_head"), {"tie_word_embeddings": True}),
        (lambda weights: {**weights, "lm_head.weight": weights[TABLE].clone()}, {"tie_word_embeddings": True}),
        (replaced(torch.ones(8), "model.layers.0.self_attn.rotary_emb.inv_freq"), {}),
        (lambda weights: {name: tensor.half() for name, tensor in weights.items()}, {}),
    ],
    ids=["tied", "tied and saved twice", "older files' rotary frequencies", "float16"],
)
def test_whole_models_are_read(change, shape, saved):
    folder = saved(change, **shape)
    model, weights = build_model(ModelConfig(), {}, str(folder), CPU), load_file(folder / "model.safetensors")
    assert torch.equal(model.get_input_embeddings().weight, weights[TABLE].float())


@pytest.mark.parametrize(
    "passed_over", [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}]
)
@pytest.mark.parametrize("from_weights", [False, True])
def test_keys_that_are_passed_over_do_not_change_what_is_returned(passed_over, from_weights, saved, tmp_path):
    settings, folder = json.loads(write_model(tmp_path / "m.json", **passed_over).read_text()), None
    if from_weights:
        folder = saved()
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **passed_over}))
    model = build_model(ModelConfig(), settings, folder and str(folder), CPU, 0)
    found = model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert found.logits.shape == (1, 3, 128) and found.attentions is None and found.hidden_states is None
    model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("passed_over", [{"id2label": {"a": 1}}, {"num_labels": "x"}])
def test_values_of_keys_that_are_passed_over_do_no_harm(passed_over, tmp_path):
    settings = json.loads(write_model(tmp_path / "m.json", **passed_over).read_text())
    build_model(ModelConfig(), settings, None, CPU, 0)


def test_a_broken_or_absent_file_is_one_line(saved, tmp_path):
    folder = saved()
    (folder / "model.safetensors").write_bytes(b"xx")
    for name in (folder, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="cannot be loaded") as refused:
            load_pretrained(AutoModelForCausalLM, str(name), "--model_name")
        assert "\n" not in str(refused.value)


def test_the_reason_says_more_than_a_key_and_advises_nothing_unsafe(saved, tmp_path):
    folder = saved()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(ConfigError, match="cannot be loaded: KeyError: 'metadata'"):
        load_pretrained(AutoModelForCausalLM, str(folder), "--model_name")
    pickled = saved()
    for file in pickled.glob("model*"):
        file.unlink(missing_ok=True)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Path))
    with pytest.raises(ConfigError, match="pickled together with other objects, which are not read") as refused:
        load_pretrained(AutoModelForCausalLM, str(pickled), "--model_name")
    assert "weights_only" not in str(refused.value)


def test_another_kind_of_model_is_not_loaded_into_a_llama(tmp_path):
    """From a hub name, too, which no file says anything about before."""
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model_type must be llama, got 'bert'"):
        check_is_llama(str(tmp_path), "--model_name_or_path")


def load_classifier(folder, **settings):
    return load_pretrained(AutoModelForSequenceClassification, str(folder), "--model", new_head=True, **settings)


@pytest.mark.parametrize("case", ["no layer", "a prefix"])
def test_only_the_head_of_a_classifier_may_be_new(case, saved):
    with pytest.raises(ConfigError, match=r"it lacks model\.(layers\.1|embed_tokens)"):
        load_classifier(saved(DAMAGED[case][0]))
    assert load_classifier(saved()).score.weight.isfinite().all()


def test_a_part_of_a_head_or_one_of_another_task_is_refused(tmp_path):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=20, **shape)).save_pretrained(tmp_path / "encoder")
    load_classifier(tmp_path / "encoder").save_pretrained(tmp_path / "classifier")
    with pytest.raises(ConfigError, match=r"classifier.bias has shape \(2,\), the model's configuration wants \(3,\)"):
        load_classifier(tmp_path / "classifier", num_labels=3)
    file = tmp_path / "classifier" / "model.safetensors"
    save_file(without("classifier.bias")(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"it lacks classifier\.bias"):
        load_classifier(tmp_path / "classifier")


def test_a_damaged_model_ends_a_run_with_exit_code_2(command, saved, capsys):
    argv = command(model_config=None, model_name_or_path=saved(without("layers.1.")))
    assert helpers.run(argv) == 2
    assert "it lacks model.layers.1." in capsys.readouterr().err


def test_a_warm_start_from_another_shape_ends_with_exit_code_2(command, saved, tmp_path, capsys):
    model = write_model(tmp_path / "other.json", rms_norm_eps=1e-2, rope_theta=100.0)
    assert helpers.run(command(model_config=model, warmed_up_model=saved())) == 2
    said = capsys.readouterr().err
    assert "its rms_norm_eps 1e-06 differs from 0.01 of --model_config" in said
    assert "its rope_theta 10000.0 differs from 100.0 of --model_config" in said


# The ids of special tokens.


def tokenizer(entries=12, **tokens):
    from tokenizers import Tokenizer as Rust
    from tokenizers.models import WordLevel

    names = {**{f"w{index}": index for index in range(entries - 3)}, "<b>": entries - 3, "</s>": entries - 2}
    rust = Rust(WordLevel({**names, "<p>": entries - 1}, unk_token="w0"))
    return Tokenizer(tokenizer_object=rust, **{"eos_token": "</s>", "pad_token": "<p>", **tokens})


@pytest.mark.parametrize(
    "shape, tokens, ids, said",
    [
        ({}, {}, (None, 10, 11), []),
        ({"eos_token_id": 1}, {}, (None, 10, 11), ["eos_token_id 1, its tokenizer 10 (</s>)"]),
        ({"eos_token_id": [2, 10]}, {}, (None, [2, 10], 11), []),
        ({"pad_token_id": -1, "eos_token_id": 10}, {}, (None, 10, 11), []),
        ({"bos_token_id": 9, "pad_token_id": 3}, {"bos_token": "<b>", "pad_token": None}, (9, 10, 3), []),
        ({"vocab_size": 11}, {}, (None, 10, None), ["pad_token_id 11 is beyond the model's vocabulary of 11"]),
    ],
)
def test_exports_have_the_tokenizers_ids(shape, tokens, ids, said, tmp_path):
    settings = json.loads(write_model(tmp_path / "m.json", **shape).read_text())
    model = build_model(ModelConfig(), settings, None, CPU, 0)
    lines = adopt(model, tokenizer(**tokens), settings)
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == ids
    generation = loaded.generation_config
    begin, end, padding = ids
    assert (generation.bos_token_id, generation.eos_token_id) == (begin, end)
    assert generation.pad_token_id == (end if padding is None else padding)


def test_a_run_and_its_export_take_them_from_the_datas_tokenizer(command, tmp_path, capsys):
    from conftest import write_blocks

    from peft_pretraining.export import export

    data = write_blocks(tmp_path / "data")
    tokenizer().save_pretrained(data)
    model = write_model(tmp_path / "model.json", eos_token_id=1)
    flags = {"num_training_steps": 2, "save_every": 2, "eval_every": 2}
    assert helpers.run(command(dataset_path=data, model_config=model, **flags)) == 0
    assert "the model's JSON has eos_token_id 1, its tokenizer 10 (</s>)" in capsys.readouterr().err
    checkpoint = tmp_path / "run" / "model_2"
    export(checkpoint, tmp_path / "out", "bfloat16")
    for folder in (checkpoint, tmp_path / "out"):
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 10
