"""What a step finds: the device, the size of everything, and data that is made here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import PROJECT

CHOICES = 4
"""Tokens that may follow a token: a text of them has ln 4 = 1.386 nats of chance in each, by which a loss ends."""


@dataclass(frozen=True)
class Scene:
    device: torch.device
    quick: bool
    folder: Path
    """Of this step alone."""
    shared: Path
    """With the data, of all steps."""

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def data(self) -> Path:
        return self.shared / "data"

    @property
    def length(self) -> int:
        return 32 if self.quick else 256

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def model(self, name: str) -> Path:
        """The JSON of a LLaMA of this size; of a tiny one where everything is quick."""
        return self.shared / "tiny.json" if self.quick else PROJECT / "configs" / f"llama_{name}.json"

    def lacks(self, gib: float) -> str:
        """Why something that needs so much memory cannot be tried; empty where it can."""
        if not self.on_cuda or self.quick or gib <= self.memory():
            return ""
        return f"it needs {gib:.0f} GiB, this device has {self.memory():.0f}"

    def memory(self) -> float:
        """GiB of the device."""
        return torch.cuda.get_device_properties(self.device).total_memory / 2**30


def argv(settings: dict[str, Any]) -> list[str]:
    return [str(part) for name, value in settings.items() if value is not None for part in (f"--{name}", value)]


def prepare(shared: Path, quick: bool) -> None:
    """Write the data and a tiny model. Called in a process of its own, for it starts threads."""
    shape = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 32},
        **{"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64},
        **{"rms_norm_eps": 1e-6, "initializer_range": 0.02},
    }
    (shared / "tiny.json").write_text(json.dumps(shape))
    write_blocks(shared / "data", *((128, 64, 32) if quick else (2048, 8192, 256)))


def write_blocks(folder: Path, vocabulary: int, rows: int, length: int) -> None:
    """A pre-tokenised folder: each token is followed by one of four others, the same ones throughout."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    rng = np.random.default_rng(0)
    followers = rng.integers(0, vocabulary, (vocabulary, CHOICES))
    tokens = np.empty((rows + 64, length), dtype=np.int32)
    tokens[:, 0] = rng.integers(0, vocabulary, len(tokens))
    for position in range(1, length):
        tokens[:, position] = followers[tokens[:, position - 1], rng.integers(0, CHOICES, len(tokens))]
    features = Features({"input_ids": List(Value("int32"), length=length)})

    def split(part: np.ndarray) -> Dataset:
        return Dataset.from_dict({"input_ids": list(part)}, features=features)

    DatasetDict({"train": split(tokens[:-64]), "validation": split(tokens[-64:])}).save_to_disk(str(folder))
    described = {"sequence_length": length, "vocab_size": vocabulary, "largest_token_id": int(tokens.max())}
    (folder / "args.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text("{}")
