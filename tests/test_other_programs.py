"""Exports in programs that are installed where somebody wants them: llama.cpp's converter, gguf, lm-eval.

pip install gguf sentencepiece lm_eval
LLAMA_CPP=/path/of/a/clone scripts/test.sh tests/test_other_programs.py
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from conftest import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretokenize
from peft_pretraining import export

WORDS = (
    "the cat sat on a mat and the dog ran over hills while rain fell upon green fields near old stone houses".split()
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A model with a SentencePiece vocabulary as T5's, from text over blocks to an export."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    from transformers import T5Tokenizer

    folder = tmp_path_factory.mktemp("sentences")
    text = "\n\n".join(" ".join(WORDS[start:] + WORDS[:start]) for start in range(len(WORDS)) for _ in range(20))
    (folder / "corpus.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        model_type="unigram",
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    (folder / "t5").mkdir()
    (folder / "spiece.model").rename(folder / "t5" / "spiece.model")
    T5Tokenizer.from_pretrained(folder / "t5", extra_ids=4).save_pretrained(folder / "t5")
    argv = ["--dataset", folder / "corpus.txt", "--tokenizer", folder / "t5", "--sequence_length", 32]
    assert pretokenize.main([str(part) for part in [*argv, "--save_dir", folder / "data", "--num_cpu", 1]]) == 0
    (data,) = (path for path in (folder / "data").iterdir() if path.is_dir() and path.suffix != ".lock")
    assert (data / "spiece.model").read_bytes() == (folder / "t5" / "spiece.model").read_bytes()
    model = write_model(folder / "model.json", vocab_size=96)
    argv = ["--model_config", model, "--dataset_path", data, "--save_dir", folder / "run", "--method", "lora"]
    argv += ["--rank", 4, "--batch_size", 8, "--total_batch_size", 8, "--lr", 1e-2, "--num_training_steps", 20]
    assert helpers.run([*argv, "--warmup_steps", 2, "--save_every", 20, "--eval_every", 20, "--workers", 0]) == 0
    assert export.main([str(folder / "run"), str(folder / "out")]) == 0
    return folder / "out"


@pytest.mark.slow
def test_gguf_reads_that_nothing_is_added(exported):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    vocabulary = gguf.SpecialVocab(exported, n_vocab=96)
    assert vocabulary.add_special_token["bos"] is vocabulary.add_special_token["eos"] is False
    assert vocabulary.special_token_ids["eos"] == 1 and vocabulary.special_token_ids["pad"] == 0


@pytest.mark.slow
def test_llama_cpps_converter_takes_an_export_as_it_is(exported, tmp_path):
    clone = os.environ.get("LLAMA_CPP")
    if clone is None:
        pytest.skip("LLAMA_CPP does not name a clone of llama.cpp")
    pytest.importorskip("gguf", reason="gguf is not installed")
    script = str(Path(clone) / "convert_hf_to_gguf.py")
    command = [sys.executable, script, str(exported), "--outfile", str(tmp_path / "m.gguf"), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    plain = AutoModelForCausalLM.from_pretrained(exported)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(converted(tokens).logits, plain(tokens).logits)


@pytest.mark.slow
def test_sentencepiece_itself_gives_the_same_tokens(exported):
    import sentencepiece

    ours = AutoTokenizer.from_pretrained(exported)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(exported / "tokenizer.model"))
    assert ours("the cat ran over hills")["input_ids"] == theirs.encode("the cat ran over hills")


@pytest.mark.slow
def test_lm_eval_measures_what_the_model_says(exported, monkeypatch):
    """Its own arithmetic over the tasks of examples/lm_eval, against the logits."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    monkeypatch.chdir(helpers.PROJECT)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path="examples/lm_eval")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={exported}",
        tasks=["held_out_text", "next_word"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    total = size = words = 0
    for line in Path("examples/lm_eval/held_out_text.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            likely = model(ids).logits.log_softmax(-1)
        total += likely[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
        size, words = size + len(text.encode()), words + len(re.split(r"\s+", text))
    assert found["held_out_text"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-6)
    assert found["held_out_text"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found["next_word"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
