"""What is seen of a run: progress, what was saved, where it went on, samples."""

from __future__ import annotations

import io
import logging
import math
import re
import sys

import helpers
import pytest
import torch
from helpers import GALORE, RESUME, stop_after
from launching import launch

from peft_pretraining.config.sections import Config
from peft_pretraining.data.tokenizer import train_tokenizer
from peft_pretraining.runtime.devices import GIB
from peft_pretraining.training import screen, utilisation
from peft_pretraining.training.screen import Screen

RECORD = {"loss": 3.2, "lr": 0.01, "throughput_tokens": 123456.7, "mfu": 0.41, "peak_memory_bytes": int(40.1 * 2**30)}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `time.monotonic` has, to be set."""
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(screen.log, "info", lambda text, *values: said.append(text % values))
    return said


def test_a_plain_line_every_few_seconds(clock, lines):
    with Screen(100, 10, True, 30.0) as shown:
        for done in range(11, 101):
            clock[0] += 4.0
            shown.show({**RECORD, "update_step": done})
    assert len(lines) == 90 // 8 + 1
    assert lines[0] == (
        "update 18/100 (18%): loss 3.200, lr 1.0e-02, 123k tok/s, MFU 41%, 40.1 GiB, ETA 05:28"  # 82 x 4 s
    )
    assert lines[-1].startswith("update 100/100 (100%): loss") and "ETA" not in lines[-1]


def test_the_time_left_counts_from_where_the_run_began_or_went_back_to(clock, lines):
    with Screen(100, 50, True, 0.0) as shown:
        clock[0] = 20.0
        shown.show({**RECORD, "update_step": 60})
        shown.go_back(40)
        clock[0] = 30.0
        shown.show({**RECORD, "update_step": 41})
    assert [line.rpartition("ETA ")[2] for line in lines] == ["01:20", "09:50"]


def test_other_ranks_show_nothing(lines):
    with Screen(1, 0, False, 0.0) as shown:
        shown.show({**RECORD, "update_step": 1})
    assert lines == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_has_a_bar_of_its_width(monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 50))
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(screen.log, "handlers", [handler])
    with Screen(200_000, 100, True, 0.0) as shown:
        shown.show({**RECORD, "update_step": 100_100})
        screen.log.warning("a line of the log")
        shown.go_back(100)
        shown.show({**RECORD, "update_step": 150_000})
    drawn = re.split(r"[\r\n]+", terminal.getvalue())
    assert "a line of the log" in [line.strip() for line in drawn]
    last = drawn[-2]
    assert last.startswith(" 75%|") and len(last) <= columns
    assert "150000/200000" in last and "loss 3.200" in last and "40.1 GiB" in last, last


def test_a_run_says_where_it_saves_goes_on_and_that_it_is_finished(command, tmp_path, capsys):
    argv = command(progress_every=0)
    stop_after(13, argv)
    err = capsys.readouterr().err
    assert "MFU" not in err  # of no CPU
    line = r"INFO update 13/20 \(65%\): loss \d\.\d{3}, lr \S+, \S+ tok/s, \S+ GiB, ETA 00:0\d"
    assert re.search(line, err), err
    for update in (10, 13):
        assert re.search(rf"INFO saved {tmp_path}/run/model_{update} \(\d+\.\d s\)\n", err)
    assert helpers.run([*argv, *RESUME]) == 0
    assert f"INFO resuming from {tmp_path}/run/model_13: updates 13 to 20\n" in capsys.readouterr().err
    assert helpers.run([*argv, *RESUME]) == 0
    assert "already finished" in capsys.readouterr().err


# Samples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat, and then it sat on the hat. " * 20], 270, 1).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the cat\n\nthe hat sat on a mat, and then\n")
    return path


@pytest.fixture
def sampling(command, tokenizer, prompts, tmp_path):
    """The command line of a run that samples every 5 updates, over a model that knows the tokenizer's ids."""
    from conftest import write_model

    model = write_model(tmp_path / "larger.json", vocab_size=300)

    def build(**changes):
        flags = {"model_config": model, "tokenizer": tokenizer, "sample_every": 5, "sample_prompts": prompts}
        return command(**{**flags, "num_training_steps": 12, **changes})

    return build


def test_samples_change_nothing_of_the_run(sampling, tmp_path, capsys):
    dropout = {"method": "lora", "rank": 4, "lora_dropout": 0.3}
    for name, changes in (("with", {}), ("without", {"sample_every": None, "sample_prompts": None})):
        assert helpers.run(sampling(save_dir=tmp_path / name, **dropout, **changes)) == 0
    said = re.findall(r'INFO update (\d+): "(.*)" \(loss \d\.\d+\) -> "(.*)"\n', capsys.readouterr().err)
    of_both = ["the cat", "the hat sat on a mat, and then"]
    assert [(update, prompt) for update, prompt, _ in said] == [
        (update, prompt) for update in ("5", "10", "12") for prompt in of_both
    ]
    helpers.assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.slow
def test_two_shards_say_and_log_what_one_process_does(sampling, tmp_path, capsys):
    """Samples and `--log_layers`: for both a sharded model's ranks work together."""
    flags = {**GALORE, "num_training_steps": 6, "log_layers": 5, "total_batch_size": 4}
    assert helpers.run(sampling(**flags, save_dir=tmp_path / "one", batch_size=4)) == 0
    said = [capsys.readouterr().err]
    argv = sampling(**flags, save_dir=tmp_path / "two", batch_size=2, distributed_type="fsdp")
    said.append(launch(tmp_path / "launch", 2, [{"argv": argv}]))
    one, two = (re.findall(r'INFO (update \d+: "[^\n]*)', text) for text in said)
    assert len(one) == 4 and one == two, said
    layers = [[r["layers"] for r in helpers.records(tmp_path / name) if "layers" in r] for name in ("one", "two")]
    assert len(layers[0]) == 2
    for alone, shared in zip(*layers, strict=True):
        assert alone.keys() == shared.keys()
        for name, of in shared.items():
            assert {*of} <= {*alone[name]} and "update_ratio" in of, name
            assert of == pytest.approx({what: alone[name][what] for what in of}, rel=1e-3), name


def test_the_loss_of_a_prompt_is_that_of_transformers():
    from transformers import LlamaConfig

    from peft_pretraining.models.causal_lm import LlamaForCausalLM
    from peft_pretraining.training.samples import prompt_losses

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, initializer_range=0.3, **shape))
    prompts = [[3, 4, 5], [9, 8, 7, 6, 5, 4], [1]]
    *losses, alone = prompt_losses(model, prompts, (2, 16), torch.device("cpu"))
    for prompt, loss in zip(prompts, losses, strict=False):
        ids = torch.tensor([prompt])
        assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    assert math.isnan(alone)


def test_what_is_right_of_a_prompt_does_not_matter(tokenizer):
    """Prompts of several lengths in one batch are continued as each is alone, by transformers' own generation."""
    from transformers import LlamaConfig

    from peft_pretraining.models.causal_lm import LlamaForCausalLM
    from peft_pretraining.training.samples import NEW_TOKENS, continue_greedily

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, initializer_range=0.3, **shape))
    prompts = [[3, 4, 5], [7], [9, 8, 7, 6, 5, 4], [1, 2], [11, 12]]
    found = continue_greedily(model.train(), prompts, (2, 64), torch.device("cpu"))
    assert model.training
    for prompt, continued in zip(prompts, found, strict=True):
        with torch.no_grad():
            whole = model.eval().generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert continued == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("text", "changes", "problem"),
    [
        (None, {"sample_prompts": None}, "--sample_every 5 needs --sample_prompts"),
        (None, {"sample_prompts": "nowhere.txt"}, "--sample_prompts nowhere.txt: no such file"),
        (b"\n \n", {}, "has no prompts: a line each, 1 to 64 of them, are wanted"),
        (b"\xff\xfe\x00", {}, "cannot be read (it is no UTF-8 text)"),
        (b"a\n" * 65, {}, "has 65 prompts"),
        (None, {"tokenizer": None}, "--sample_every 5: --tokenizer"),  # the test data's folder holds none
        (None, {"model_config": "small"}, "beyond the model's vocabulary of 128"),
    ],
)
def test_samples_that_cannot_be_made(sampling, prompts, model_json, capsys, text, changes, problem):
    if text is not None:
        prompts.write_bytes(text)
    if "model_config" in changes:
        changes = {"model_config": model_json}
    assert helpers.run(sampling(**changes)) == 2
    err = capsys.readouterr().err
    assert problem in err and "Traceback" not in err, err


def test_prompts_without_samples_are_said_to_be_without_effect(sampling, capsys):
    assert helpers.run(sampling(sample_every=0, num_training_steps=2)) == 0
    assert "without effect without --sample_every: --sample_prompts" in capsys.readouterr().err


# MFU


def test_flops_of_a_llama():
    """LLaMA-7B: 6.6e9 weights in products of 32 layers and the head, and attention over 2,048 tokens."""
    from transformers import LlamaConfig

    shape = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert utilisation.flops_per_token(shape, 2048) == 6 * weights + 12 * 32 * 4096 * 2048
    grouped = LlamaConfig(**{**shape.to_dict(), "num_key_value_heads": 8})
    assert utilisation.flops_per_token(grouped, 2048) == 6 * (weights - 32 * 2 * 4096 * 3072) + 12 * 32 * 4096 * 2048


def test_mfu_is_of_the_peak_of_all_devices(monkeypatch):
    from types import SimpleNamespace

    from transformers import LlamaConfig

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    memory = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    config = Config().replace(max_length=256, world_size=2, precision="bf16")
    shape = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
    measured = utilisation.Utilisation(config, shape, torch.device("cuda"))
    expected = 1e6 * utilisation.flops_per_token(shape, 256) / (2 * 989e12)
    assert measured.of(1e6) == {"mfu": pytest.approx(expected)}
    assert utilisation.Utilisation(config, shape, torch.device("cpu")).of(1e6) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090 Laptop GPU")
    assert utilisation.Utilisation(config, shape, torch.device("cuda")).of(1e6) == {}
