"""Compiled layers: the numbers of eager ones, how often they are compiled, and what a run keeps of it."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import helpers
import pytest
import torch
from conftest import write_blocks, write_model

from peft_pretraining.config import ModelConfig, cli
from peft_pretraining.flags import ConfigError
from peft_pretraining.models import compiled
from peft_pretraining.models.compiled import compilation_of, compile_layers, why_not
from peft_pretraining.models.compute_dtype import compute_in
from peft_pretraining.models.llama import build_model
from peft_pretraining.models.loss import token_loss_sum
from peft_pretraining.runtime.watchdog import Watchdog, watched
from peft_pretraining.training import device_settings

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 33}
GALORE = {"method": "galore", "rank": 4, "update_proj_gap": 4}


@pytest.fixture(scope="module", autouse=True)
def compiler(tmp_path_factory):
    """Inductor, without processes of its own and with a cache that nobody else has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield


@pytest.fixture
def without_inductor(monkeypatch):
    """The same graphs, run operator by operator; any that would have to be made again is an error."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiled, "_LATER", "fail_on_recompile")


def llama(dtype=torch.float64, **settings):
    model = build_model(ModelConfig(dtype=str(dtype).removeprefix("torch."), **settings), SHAPE, None, CPU, seed=1)
    compute_in(model, dtype)  # transformers' own norms are in float32
    return model


def batch(sequences=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, SHAPE["vocab_size"], (sequences, 8), generator=generator)}


def passes(model):
    """Losses and gradients of three batches, and losses of an evaluation whose last batch is smaller."""
    numbers = []
    for seed in range(3):
        loss = token_loss_sum(model, batch(seed=seed))
        loss.backward()
        numbers.append(loss.detach())
    model.eval()
    with torch.no_grad():
        numbers += [token_loss_sum(model, batch(sequences)) for sequences in (4, 4, 1)]
    model.train()
    return [*numbers, *(param.grad for param in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_what_eager_ones_do(checkpointing, without_inductor):
    eager, model = (llama(activation_checkpointing=checkpointing) for _ in range(2))
    keys, modules = list(model.state_dict()), list(model.modules())
    compilation = compile_layers(model)
    assert list(model.state_dict()) == keys and list(model.modules()) == modules
    torch.testing.assert_close(passes(model), passes(eager), rtol=1e-12, atol=1e-12)
    assert compilation is compilation_of(model) and compilation_of(eager) is None
    assert compilation.compilations == 2 and not compilation.failed  # of three layers, for training and evaluation
    assert compilation.news()["compilations"] == 2 and compilation.news() == {}


def test_a_frozen_embedding_makes_no_further_graph(without_inductor):
    eager, model = llama(), llama()
    for each in (eager, model):
        each.get_input_embeddings().weight.requires_grad_(False)
    compilation = compile_layers(model)
    for each in (eager, model):
        token_loss_sum(each, batch()).backward()
    assert compilation.compilations == 1
    gradients = [[param.grad for param in each.parameters() if param.requires_grad] for each in (eager, model)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_compiled_runs_eagerly_and_is_said_once(monkeypatch, caplog, without_inductor):
    eager, model = llama(), llama()
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward

    def printing(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", printing)
    compilation = compile_layers(model)
    with caplog.at_level(logging.WARNING, "peft_pretraining"):
        torch.testing.assert_close(passes(model), passes(eager), rtol=0, atol=0)
    (line,) = (record.getMessage() for record in caplog.records)
    assert compilation.failed and line.startswith("LlamaDecoderLayer for training cannot be compiled")
    assert "\n" not in line


def test_without_a_compiler_nothing_is_compiled(monkeypatch, caplog):
    assert why_not(CPU) is None
    monkeypatch.setattr(compiled, "_without_host_compiler", lambda: "there is no C++ compiler")
    with pytest.raises(ConfigError, match=r"--compile on: there is no C\+\+ compiler"):
        device_settings.compile_or_not("on", "cpu")
    assert device_settings.compile_or_not("auto", "cpu") == device_settings.compile_or_not("off", "cpu") == "off"
    monkeypatch.setattr(compiled, "_finds_triton", lambda: False)
    with caplog.at_level(logging.WARNING, "peft_pretraining"):
        assert device_settings.compile_or_not("auto", "cuda") == "off"
    assert "triton is not installed" in caplog.text


def test_compiling_inside_an_update_has_time_of_its_own(tmp_path):
    @watched("compiling", 20)
    def compile_something():
        time.sleep(0.6)

    with Watchdog(0.2, tmp_path, 0) as dog:
        for step in range(3):
            with dog.update(step):
                if step == 2:
                    compile_something()
                time.sleep(0.05)
                assert dog._deadline is not None and dog._factor == (10 if step == 0 else 1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    data = write_blocks(folder / "data", train=128, validation=9, block=16, vocabulary=33)
    model = write_model(folder / "llama.json", max_position_embeddings=16, **SHAPE)

    def flags(save_dir: Path, **changes) -> list[str]:
        settings = {
            **{"model_config": model, "dataset_path": data, "save_dir": save_dir, "batch_size": 4, "workers": 0},
            **{"gradient_accumulation": 2, "num_training_steps": 20, "warmup_steps": 2, "lr": 0.01, "eval_every": 10},
            **{"save_every": 5, "dtype": "float32", **changes},
        }
        return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]

    return flags


def test_a_run_compiles_a_layer_twice_at_most(command, tmp_path, capsys, without_inductor):
    """Training, evaluation with a smaller last batch, saves, and the same again after a resume."""
    argv = command(tmp_path / "run", compile="on", num_training_steps=6, eval_every=3, save_every=3)
    helpers.stop_after(2, argv)
    assert helpers.run([*argv, *helpers.RESUME]) == 0
    records = [record for record in helpers.records(tmp_path / "run") if "compilations" in record]
    assert [record["compilations"] for record in records] == [2, 1, 2]  # the resumed run trains before it evaluates
    assert all(record["compile_seconds"] > 0 for record in records)
    said = re.findall("compiled (.*) in [0-9.]+ s", capsys.readouterr().err)
    assert said == [f"LlamaDecoderLayer for {what}" for what in ("evaluation", "training", "training", "evaluation")]


def test_a_run_keeps_what_it_began_with(command, tmp_path, without_inductor):
    """Also one that was begun before there was a choice; and what is asked for counts."""
    argv = command(tmp_path / "run", num_training_steps=2, compile="on", fused_loss="on", lean_layers="on")
    helpers.stop_after(1, argv)
    plain = command(tmp_path / "run", num_training_steps=2, autoresume=True)

    def resumed(*more) -> tuple[str, str, str]:
        model = cli.load([*plain, *more], environ={}).config.model
        return model.compile, model.fused_loss, model.lean_layers

    assert resumed() == ("on", "on", "on") and resumed("--compile", "off") == ("off", "on", "on")
    for name in ("config.yaml", "model_1/training_state.json"):
        path = tmp_path / "run" / name
        text = path.read_text().replace("compile", "other").replace("fused_loss", "another")
        path.write_text(text.replace("lean_layers", "a_third"))
    assert resumed() == ("off", "off", "off")
    assert cli.load(command(tmp_path / "new"), environ={}).config.model.compile == "auto"


AGREE = {
    "full_rank": {"method": "full_rank"},
    "lora": {"method": "lora", "rank": 4},
    "lora with dropout": {"method": "lora", "rank": 4, "lora_dropout": 0.2},
    "galore": GALORE,
    "galore per layer": {**GALORE, "per_layer": True},
    "golore_adapter": {**GALORE, "method": "golore_adapter", "rand_ratio": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("case", AGREE)
def test_a_compiled_run_has_the_losses_of_an_eager_one(case, checkpointing, fused, command, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_LATER", "fail_on_recompile")
    changes = {**AGREE[case], "activation_checkpointing": checkpointing, "fused_loss": fused}
    numbers = []
    for compile in ("off", "on"):
        assert helpers.run(command(tmp_path / compile, compile=compile, **changes)) == 0
        losses = [row[1] for row in (*helpers.updates(tmp_path / compile), *helpers.evaluations(tmp_path / compile))]
        assert len(losses) == 20 + 3
        numbers.append(torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(*numbers, rtol=1e-5, atol=0)
    counts = [record["compilations"] for record in helpers.records(tmp_path / "on") if "compilations" in record]
    assert counts[-1] == 2 + (fused == "on")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inductor_computes_float64_as_eager_layers_do(checkpointing):
    eager, model = (llama(activation_checkpointing=checkpointing) for _ in range(2))
    compile_layers(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (eager, model)]
    for seed in range(20):
        losses = []
        for each, optimizer in zip((eager, model), optimizers, strict=True):
            losses.append(token_loss_sum(each, batch(seed=seed)))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", [{}, {**GALORE, "fused_loss": "on"}], ids=["full_rank", "galore fused"])
def test_a_stopped_and_resumed_compiled_run_ends_bit_by_bit_as_an_undisturbed_one(case, command, tmp_path):
    changes = {"compile": "on", "num_training_steps": 10, **case}
    assert helpers.run(command(tmp_path / "whole", **changes)) == 0
    argv = command(tmp_path / "stopped", **changes)
    helpers.stop_after(4, argv)
    assert helpers.run([*argv, *helpers.RESUME]) == 0
    helpers.assert_same_run(tmp_path / "stopped", tmp_path / "whole")
