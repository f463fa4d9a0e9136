"""Tiny models, tokenizers and GLUE files for fine-tuning, and runs of `run_glue.py` in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import helpers  # noqa: F401  (puts the project's folder on the path)
import torch

WORDS = [f"w{i}" for i in range(40)]
VOCABULARY = 48

ROWS = {
    "cola": ("sentence", None, 2),
    "mnli": ("premise", "hypothesis", 3),
    "mrpc": ("sentence1", "sentence2", 2),
    "qnli": ("question", "sentence", 2),
    "qqp": ("question1", "question2", 2),
    "rte": ("sentence1", "sentence2", 2),
    "sst2": ("sentence", None, 2),
    "stsb": ("sentence1", "sentence2", 0),
    "wnli": ("sentence1", "sentence2", 2),
}
"""Columns and number of classes (0: scores) of each task."""


def rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose label is told by the text's first word."""
    first, second, classes = ROWS[task]
    draw, found = random.Random(seed), []
    for _ in range(count):
        number = draw.randrange(classes or 6)
        row = {first: " ".join([f"w{number}", *draw.choices(WORDS[6:], k=draw.randrange(2, 8))])}
        if second:
            row[second] = " ".join(draw.choices(WORDS[6:], k=draw.randrange(2, 6)))
        found.append({**row, "label": number if classes else float(number)})
    return found


def write_rows(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def write_tokenizer(folder: Path, kind: str, padding_side: str = "right") -> None:
    """Words by number. `bert`: [CLS] ... [SEP] ... [SEP]; `llama` as T5's: pad 0, eos 1, no bos, eos appended."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if kind == "bert" else ["<pad>", "</s>", "<unk>", "<extra>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    unknown = special[1] if kind == "bert" else special[2]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
        )
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    else:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 1)])
        names = {"eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, padding_side=padding_side, model_max_length=64, **names
    )
    fast.save_pretrained(folder)


def write_bert(folder: Path, **changes: Any) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2},
    }
    BertModel(BertConfig(**{**shape, **changes})).save_pretrained(folder)
    write_tokenizer(folder, "bert")
    return folder


def write_llama(folder: Path, padding_side: str = "right", **changes: Any) -> Path:
    """A folder as a pre-training checkpoint is: a causal LLaMA and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2},
        **{"bos_token_id": None, "eos_token_id": 1},
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    write_tokenizer(folder, "llama", padding_side)
    return folder


def glue_flags(**flags: Any) -> list[str]:
    """A command line; None leaves a flag out."""
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def run_glue(**flags: Any) -> dict[str, Any]:
    """`run_glue.py` with small defaults, in this process; the results it wrote."""
    import run_glue as script

    small = {
        **{"do_train": True, "do_eval": True, "max_steps": 4, "per_device_train_batch_size": 4, "max_length": 24},
        **{"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True},
    }
    assert script.main(glue_flags(**{**small, **flags})) == 0
    return json.loads((Path(flags["output_dir"]) / "all_results.json").read_text())
