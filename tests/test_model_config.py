"""Models' JSONs: what each key may hold, contradictions, published files, and whether two are of one model."""

import json

import pytest
from conftest import write_model

from peft_pretraining.models import model_config
from peft_pretraining.models.model_config import differences, read_model_json

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


def read(path, text=None, **changes):
    """Settings, problems and warnings of a JSON."""
    write_model(path, **changes)
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    problems, warnings = [], []
    return read_model_json(str(path), "--model_config", problems, warnings), problems, warnings


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_scaling": {"rope_type": "helix"}}, "unknown rope_type 'helix'"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "unknown rope_type ['llama3']"),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "give one of them"),
        ({"rope_scaling": {**LLAMA3, "beta": 1}}, "knows no 'beta'"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor of rope_scaling must be a number from 1 on, got '8'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be above low_freq_factor"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e4}}, "contradict each other"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta 500000.0 and 10000.0"),
        ({"rope_theta": "10000"}, "rope_theta must be a number from 1 on, got '10000'"),
        ({"rope_theta": -1}, "rope_theta must be"),
        ({"rope_theta": True}, "rope_theta must be"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object"),
        ({"hidden_act": "sillu"}, "hidden_act must be one of"),
        ({"hidden_act": None}, "hidden_act must be one of"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "llama"}, "a list of LLaMA's classes"),
        ({"architectures": ["Llama4ForCausalLM"]}, "a list of LLaMA's classes"),
        ({"model_type": None}, "model_type must be llama"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 10**6}, "up to 10000, got 1000000"),
        ({"vocab_size": 10**40}, "vocab_size must be a positive integer"),
        ({"hidden_size": 32.0}, "hidden_size must be"),
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"num_attention_heads": 3, "head_dim": 16}, "3 must divide hidden_size 32"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 must divide num_attention_heads 2"),
        ({"head_dim": 7}, "must be even"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be"),
        ({"attention_dropout": 1.0}, "attention_dropout must be"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"rope_interleaved": True}, "rope_interleaved True would make it another model"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"k" * 5000: 1}, "unknown key"),
    ],
)
def test_a_value_that_would_train_something_else_is_one_line(changes, words, tmp_path):
    settings, problems, _ = read(tmp_path / "m.json", **changes)
    assert settings is None and len(problems) == 1 and words in problems[0] and "\n" not in problems[0]
    assert len(problems[0]) < 500


@pytest.mark.parametrize("key", [name for name in LLAMA3 if name != "rope_type"])
def test_llama3s_rotary_embedding_needs_all_its_numbers(key, tmp_path):
    numbers = {name: value for name, value in LLAMA3.items() if name != key}
    _, problems, _ = read(tmp_path / "m.json", rope_scaling=numbers)
    assert [line.endswith(f"of rope_type llama3 lacks {key}") for line in problems] == [True]


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
        ("[1]", "must hold a JSON object"),
        ('{"vocab_size": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"rms_norm_eps": NaN}', "NaN is no JSON number"),
        ('{"rms_norm_eps": 1e999}', "rms_norm_eps must be"),
        ('{"vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' is there twice"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("", "not valid JSON"),
        (" " * 20_000_000, "larger than"),
    ],
)
def test_files_that_are_no_object_are_one_line(text, words, tmp_path):
    settings, problems, _ = read(tmp_path / "m.json", text)
    assert settings is None and len(problems) == 1 and words in problems[0] and "\n" not in problems[0]


@pytest.mark.parametrize("path", ["/dev/zero", "/", "x" * 5000, "a\0b"])
def test_what_is_no_file_is_one_line(path):
    problems = []
    assert read_model_json(path, "--model_config", problems) is None and len(problems) == 1


def test_a_byte_order_mark_is_no_problem(tmp_path):
    settings, problems, _ = read(tmp_path / "m.json", b'\xef\xbb\xbf{"model_type": "llama"}')
    assert settings == {"model_type": "llama"} and not problems


def test_harmless_keys_of_published_files_are_passed_over_and_said(tmp_path):
    published = {
        **{"is_llama_config": True, "rope_interleaved": False, "_name_or_path": "x", "torch_dtype": "float16"},
        **{"transformers_version": "4.31", "pretraining_tp": 2, "quantization_config": None, "temperature": 0.9},
        **{"auto_map": {"AutoModel": "m.M"}, "layer_types": ["full_attention"]},
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    }
    settings, problems, warnings = read(tmp_path / "m.json", **published)
    assert settings is not None and not problems and len(warnings) == 1
    for key in published.keys() - {"transformers_version"}:
        assert key in warnings[0]
    assert "never run" in warnings[0] and not read(tmp_path / "m.json")[2]


SAME = [
    {"rope_theta": 10_000},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    {"num_key_value_heads": 2, "head_dim": 16},
    {"hidden_act": "swish", "attention_bias": False, "attention_dropout": 0},
    {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": -1, "use_cache": False},
]


@pytest.mark.parametrize("changes", SAME)
def test_models_are_the_same_with_defaults_filled_in(changes, tmp_path):
    assert differences(read(tmp_path / "a.json")[0], read(tmp_path / "b.json", **changes)[0]) == []


OTHERS = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256, "hidden_act": "gelu"},
    **{"initializer_range": 0.01, "rms_norm_eps": 1e-2, "attention_dropout": 0.1, "tie_word_embeddings": True},
    **{"attention_bias": True, "mlp_bias": True, "rope_theta": 100.0},
}


@pytest.mark.parametrize("key", OTHERS)
def test_models_differ_in_any_key(key, tmp_path):
    one, two = read(tmp_path / "a.json")[0], read(tmp_path / "b.json", **{key: OTHERS[key]})[0]
    ((name, first, second),) = differences(one, two)
    assert (name, second) == (key, OTHERS[key]) and first != second


def test_every_key_of_the_identity_is_compared():
    """Those of rotary embeddings are compared number by number."""
    assert model_config.IDENTITY_KEYS - OTHERS.keys() - model_config.WITHOUT_FUNCTION == {
        *("rope_scaling", "rope_parameters")
    }


def test_another_rotary_embedding_is_another_model(tmp_path):
    one, two = (read(tmp_path / "m.json", rope_scaling=LLAMA3 | change)[0] for change in ({}, {"factor": 4.0}))
    assert differences(one, two) == [("factor", 8.0, 4.0)]
    assert [name for name, *_ in differences(read(tmp_path / "m.json")[0], one)] == list(LLAMA3)


def test_a_model_beyond_the_machine_is_one_line(tmp_path):
    settings, *_ = read(tmp_path / "m.json", vocab_size=2**31 - 1, hidden_size=2**20)
    assert "GB, and this machine has" in model_config.memory_problem(settings, 4, 1)
    assert model_config.memory_problem(json.loads(write_model(tmp_path / "m.json").read_text()), 4, 1) is None
