"""Blocks of 2,048 tokens with documents kept apart: from text to a text that is gone on with."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from conftest import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretokenize
from peft_pretraining import generate
from peft_pretraining.config import cli
from peft_pretraining.data.blocks import TokenBlocks
from peft_pretraining.flags import ConfigError

LENGTH = 2048
WORDS = "the of and to in water energy nation people great law small river mountain light house never again".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Blocks as `pretokenize.py` writes them, with a tokenizer of their own."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, rng.integers(20, 400))) + "." for _ in range(160))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["--dataset", folder / "texts.jsonl", "--sequence_length", LENGTH, "--train_tokenizer", 300]
    assert pretokenize.main([*map(str, argv), "--num_cpu", "1", "--save_dir", str(folder / "data")]) == 0
    return folder


def command(folder: Path, *more: str, **changes) -> list[str]:
    (data,) = (path.parent for path in (folder / "data").rglob("args.json"))
    settings = {
        **{"dataset_path": data, "model_config": folder / "llama.json", "max_length": LENGTH, "document_mask": "True"},
        **{"batch_size": 2, "gradient_accumulation": 1, "num_training_steps": 4, "warmup_steps": 1, "lr": 0.01},
        **{"eval_every": 4, "save_every": 4, "workers": 0, "method": "galore", "rank": 4, **changes},
    }
    return [*(part for name, value in settings.items() for part in (f"--{name}", str(value))), *more]


def shape(folder: Path, **changes) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 300, "bos_token_id": None}
    return write_model(folder / "llama.json", **{**sizes, "max_position_embeddings": LENGTH, **changes})


def test_blocks_of_2048_from_text_to_text(folder, tmp_path, capsys):
    shape(folder)
    run = tmp_path / "run"
    assert helpers.run(command(folder, "--save_dir", str(run))) == 0
    (_, first), (_, last) = helpers.evaluations(run)
    assert last < first
    checkpoint = run / "model_4"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.model_max_length == LENGTH
    assert generate.main([str(checkpoint), "the water", "--max_new_tokens", "5", "--greedy"]) == 0
    assert capsys.readouterr().out.startswith("the water")

    # The last evaluation is that of documents by themselves, and of each one's first token behind an end token alone.
    model = AutoModelForCausalLM.from_pretrained(checkpoint).double()
    (data,) = (path.parent for path in (folder / "data").rglob("args.json"))
    blocks, end = TokenBlocks(data, "validation", LENGTH), tokenizer.eos_token_id
    total = tokens = 0.0
    for ids in map(blocks.__getitem__, range(len(blocks))):
        starts = [0, *(place + 1 for place in (ids == end).nonzero()[:, 0].tolist() if place + 1 < LENGTH), LENGTH]
        for begin, stop in itertools.pairwise(starts):
            logits = model(ids[None, begin:stop]).logits[0]
            targets = ids[begin + 1 : stop + 1]  # the next document's first token among them
            total += torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum").item()
            tokens += len(targets)
    assert tokens == len(blocks) * (LENGTH - 1)
    assert total / tokens == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize(("positions", "length"), [(1024, 2048), (2047, 2048), (512, 1024)])
def test_sequences_beyond_the_models_positions_are_refused(folder, tmp_path, positions, length):
    shape(folder, max_position_embeddings=positions)
    with pytest.raises(ConfigError) as error:
        cli.load(command(folder, max_length=length, save_dir=tmp_path / "run"), environ={})
    assert error.value.problems == [
        f"--max_length {length} is beyond the model's {positions} positions "
        "(max_position_embeddings: they have no weights, so that a new model may have more)"
    ]


def test_pieces_of_long_blocks_begin_documents_anew(folder, tmp_path):
    """The same 2,048 tokens, cut to 256: documents go on in the next piece, from position 0."""
    shape(folder, max_position_embeddings=256)
    assert helpers.run(command(folder, max_length=256, save_dir=tmp_path / "run", num_training_steps=1)) == 0
    assert helpers.updates(tmp_path / "run")
