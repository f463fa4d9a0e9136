"""What it costs to keep the documents of a block apart, or saves: forward and backward passes on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/document_mask.py

The three ways take turns in one process; medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_pretraining.config import ModelConfig
from peft_pretraining.models import loss
from peft_pretraining.models.llama import build_model
from peft_pretraining.training.build_data import documents_apart

SHAPE = {
    **{"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
}
WAYS = ("without", "one by one", "by a mask")
END, ROUNDS = 1, 13


def blocks(batch: int, length: int, tokens: int) -> torch.Tensor:
    """Random tokens in documents of `tokens` on average."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, SHAPE["vocab_size"], (batch, length), generator=generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 1 / tokens, END)


def seconds(model: torch.nn.Module, ids: torch.Tensor, way: str) -> float:
    """Of a forward and a backward pass. Compiled layers take a mask; here they only seem to be compiled."""
    compiled = object() if way == "by a mask" else None
    with patch.object(loss, "compilation_of", lambda model: compiled):
        begun = time.perf_counter()
        batch = documents_apart({"input_ids": ids}, None if way == "without" else END)
        (loss.token_loss_sum(model, batch) / ids.numel()).backward()
        model.zero_grad()
        return time.perf_counter() - begun


def main() -> None:
    model = build_model(ModelConfig(dtype="float32"), SHAPE, None, torch.device("cpu"), seed=1)
    print("| block | documents | " + " | ".join(f"{way}, tokens/s" for way in WAYS) + " |")
    print("|--:|--:|--:|--:|--:|")
    for batch, length in ((8, 256), (1, 2048)):
        for tokens in (32, 256, 1000):
            ids = blocks(batch, length, tokens)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(ROUNDS):
                for place in range(len(WAYS)):
                    way = WAYS[(number + place) % len(WAYS)]
                    times[way].append(seconds(model, ids, way))
            rates = [ids.numel() / statistics.median(times[way][1:]) for way in WAYS]
            print(f"| {length} | {tokens} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |", flush=True)


if __name__ == "__main__":
    main()
