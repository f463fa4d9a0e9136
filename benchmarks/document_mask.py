"""What it costs to keep the documents of a block apart, or saves: forward and backward passes on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/document_mask.py [--model_config JSON] [--tokens 32 256 1000] [--rounds 13]

The three ways take turns in one process; medians without the first round.
"""

from __future__ import annotations

import argparse
import json
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
LAYOUTS = ((8, 256), (1, 2048))
"""Sequences in a micro-batch, and their length: as many tokens in each."""
END = 1


def blocks(vocabulary: int, batch: int, length: int, tokens: int) -> torch.Tensor:
    """Random tokens in documents of `tokens` on average."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (batch, length), generator=generator)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", type=Path, help="JSON of a shape; 4 layers of 128 unless given")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 256, 1000], help="of a document, on average")
    parser.add_argument("--rounds", type=int, default=13, help="the first of which is not counted")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds} must be 2 at least: the first is not counted")
    shape = SHAPE if options.model_config is None else json.loads(options.model_config.read_text())
    shape = {**shape, "max_position_embeddings": 2048}  # positions have no weights
    model = build_model(ModelConfig(dtype="float32"), shape, None, torch.device("cpu"), seed=1)
    print("| block | documents | " + " | ".join(f"{way}, tokens/s" for way in WAYS) + " |")
    print("|--:|--:|--:|--:|--:|")
    for batch, length in LAYOUTS:
        for tokens in options.tokens:
            ids = blocks(shape["vocab_size"], batch, length, tokens)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(options.rounds):
                for place in range(len(WAYS)):
                    way = WAYS[(number + place) % len(WAYS)]
                    times[way].append(seconds(model, ids, way))
            rates = [ids.numel() / statistics.median(times[way][1:]) for way in WAYS]
            print(f"| {length} | {tokens} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |", flush=True)


if __name__ == "__main__":
    main()
