"""Validation on several named sets, and bits per byte beside perplexity."""

from __future__ import annotations

import json
import math

import helpers
import pytest
import torch
from conftest import write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pretokenize
from peft_pretraining.checkpoint import resumed_metrics
from peft_pretraining.data.blocks import TokenBlocks
from peft_pretraining.data.folder import bytes_per_token, read_arguments
from peft_pretraining.data.tokenizer import train_tokenizer

LENGTH = 32
WORDS = "the river ran by the old town, über Stock und Stein, and nobody saw it but the miller's cat".split()


def documents(first: int, count: int) -> list[str]:
    return [" ".join(WORDS[(n * 7 + i) % len(WORDS)] for i in range(20 + n % 9)) for n in range(first, first + count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three data folders of one tokenizer, and a model."""
    folder = tmp_path_factory.mktemp("sets")
    train_tokenizer(documents(0, 50), 300, 1).save_pretrained(folder / "bpe")
    for name, first in (("main", 0), ("wiki", 1000), ("news", 3000)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(first, 120)))
        argv = ["--dataset", folder / f"{name}.jsonl", "--tokenizer", folder / "bpe", "--save_dir", folder / "data"]
        argv += ["--sequence_length", LENGTH, "--validation_fraction", 0.3, "--num_cpu", 1]
        assert pretokenize.main(list(map(str, argv))) == 0
    write_model(folder / "model.json", vocab_size=300)
    return folder


def data(folder, name):
    return folder / "data" / f"{name}_bpe_{LENGTH}"


def command(folder, save_dir, *more):
    argv = ["--model_config", folder / "model.json", "--dataset_path", data(folder, "main"), "--save_dir", save_dir]
    argv += ["--num_training_steps", 4, "--eval_every", 2, "--save_every", 4, "--warmup_steps", 0, "--workers", 0]
    return [*argv, "--batch_size", 4, "--lr", 0.01, *more]


def test_sets_are_evaluated_beside_the_runs_own(folder, tmp_path, capsys):
    sets = f"wiki={data(folder, 'wiki')},news={data(folder, 'news')}"
    assert helpers.run(command(folder, tmp_path / "run", "--eval_datasets", sets)) == 0
    said = capsys.readouterr().err
    assert "; wiki loss " in said and "; news loss " in said
    evaluations = [record for record in helpers.records(tmp_path / "run") if "final_eval_loss" in record]
    assert [record["update_step"] for record in evaluations] == [0, 2, 4]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model_4").double().eval()
    own = {name: evaluations[-1][f"final_eval_{name}"] for name in ("loss", "perplexity", "tokens", "bits_per_byte")}
    for name, found in {"main": own, **evaluations[-1]["eval_sets"]}.items():
        blocks = TokenBlocks(data(folder, name), "validation", LENGTH)
        ids = blocks.__getitems__(list(range(len(blocks))))["input_ids"]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert found["loss"] == pytest.approx(loss, abs=1e-5) and found["tokens"] == len(blocks) * (LENGTH - 1)
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        per_token = bytes_per_token(read_arguments(data(folder, name)), "validation")
        assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / per_token, rel=1e-4)


def test_a_run_is_the_same_without_them(folder, tmp_path):
    for name, more in (("with", ["--eval_datasets", f"wiki={data(folder, 'wiki')}"]), ("without", [])):
        assert helpers.run(command(folder, tmp_path / name, *more)) == 0
    one, other = (load_file(tmp_path / name / "model_4" / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_bytes_are_those_of_the_text(folder):
    """Held out or not, each document's bytes are counted once."""
    arguments = read_arguments(data(folder, "main"))
    total = sum(len(text.encode()) for text in documents(0, 120))
    assert sum(arguments["text_bytes"].values()) == total > sum(map(len, documents(0, 120)))
    share = arguments["text_bytes"]["validation"] / arguments["validation"]["tokens"]
    assert bytes_per_token(arguments, "validation") == share
    del arguments["text_bytes"]
    assert bytes_per_token(arguments, "validation") is None  # of an older folder


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("nowhere", "must be NAME=FOLDER"),
        ("loss=x", "must be NAME=FOLDER"),
        ("a=x,a=y", "two sets of the name a"),
        ("a=nowhere", "--eval_datasets a=nowhere: no such folder"),
        ("a={folder}", "was not written by pretokenize.py"),
        ("a={short}", "its blocks of 24 tokens cannot be cut into pieces of 32"),
        ("a={other}", "its tokenizer has vocab_size 290, that of the run's data 300"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, tmp_path, capsys, given, problem):
    paths = {"folder": folder}
    for name, change in (("short", {"sequence_length": 24}), ("other", {"vocab_size": 290})):
        paths[name] = tmp_path / name
        paths[name].mkdir()
        for path in data(folder, "wiki").iterdir():
            (paths[name] / path.name).symlink_to(path)
        arguments = {**read_arguments(data(folder, "wiki")), **change}
        (paths[name] / "args.json").unlink()
        (paths[name] / "args.json").write_text(json.dumps(arguments))
    assert helpers.run(command(folder, tmp_path / "run", "--eval_datasets", given.format(**paths))) == 2
    err = capsys.readouterr().err
    assert problem in err and "Traceback" not in err, err


def test_a_loss_that_is_not_finite_is_null_in_sets_too():
    line = resumed_metrics.encode({"update_step": 1, "eval_sets": {"wiki": {"loss": math.nan, "tokens": 3}}})
    assert json.loads(line) == {"update_step": 1, "eval_sets": {"wiki": {"loss": None, "tokens": 3}}}
