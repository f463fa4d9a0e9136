"""Sets of LLaMA's layers, with gradients after some updates of training on real text, for benchmarks of optimizers."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from peft_pretraining.data.blocks import TokenBlocks  # noqa: E402
from peft_pretraining.data.tokenizer import load_tokenizer  # noqa: E402
from peft_pretraining.models.targets import target_linears  # noqa: E402
from peft_pretraining.optim import LowRankOptimizer  # noqa: E402
from peft_pretraining.optim.basis.svd import random_stiefel  # noqa: E402
from peft_pretraining.optim.tensors.projection import LEFT, Bases, Projection  # noqa: E402

QUICKSTART = PROJECT / "quickstart" / "data" / "wiki_intros_bpe4096_128"


@dataclass
class Layer:
    """A weight W (m, n), its gradient, and the bases that the same training took from an earlier one."""

    weight: Tensor
    grad: Tensor
    start: Bases

    def to(self, device: torch.device, dtype: torch.dtype) -> Layer:
        bases = {side: basis.to(device, dtype) for side, basis in self.start.items()}
        return Layer(self.weight.to(device, dtype), self.grad.to(device, dtype), bases)


@dataclass
class LayerSet:
    name: str
    title: str
    rank: int
    layers: list[Layer]
    real: bool
    """Whether the gradients come from a training."""

    def projections(self) -> list[Projection]:
        return [Projection.for_weight("std", self.rank, layer.weight.shape) for layer in self.layers]


@dataclass
class Training:
    """The training that the gradients come from."""

    updates: int
    gap: int
    batch_size: int
    length: int
    last_batches: int
    """Batches that the gradient after the training is the mean over: its rank is at most its number of tokens."""
    lr: float = 0.005
    seed: int = 0

    @property
    def blocks(self) -> int:
        """Blocks that it reads."""
        return (self.updates + self.last_batches) * self.batch_size


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="text file to train on; goes with --tokenizer")
    parser.add_argument("--tokenizer", help="tokenizer's folder or hub name")
    parser.add_argument("--data", type=Path, help="folder written by pretokenize.py, instead (default: quickstart's)")
    parser.add_argument("--work", type=Path, help="folder to keep the gradients in for the next run (default: nowhere)")
    parser.add_argument("--updates", type=int, default=100, help="updates of training before the gradient is taken")
    parser.add_argument("--gap", type=int, default=50, help="age of the basis that warm-started refreshes begin with")
    parser.add_argument("--batch_size", type=int, default=4, help="of the training, in blocks")
    parser.add_argument("--last_batches", type=int, default=16, help="batches that the gradient is the mean over")
    parser.add_argument("--length", type=int, default=128, help="tokens per block of the training")


def read_blocks(arguments: argparse.Namespace, training: Training) -> Tensor | None:
    """Token blocks (N, length) of the text or data folder that the flags name, or None if they name none."""
    if arguments.text:
        if not arguments.tokenizer:
            raise SystemExit("--text needs --tokenizer")
        wanted = training.blocks * training.length
        text = arguments.text.read_text()[: 12 * wanted]  # tokens are shorter than 12 characters, on average
        ids = load_tokenizer(arguments.tokenizer)(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < wanted:
            raise SystemExit(f"{arguments.text} has {len(ids)} tokens, but the training needs {wanted}")
        return torch.tensor(ids[:wanted]).view(-1, training.length)
    folder = arguments.data or (QUICKSTART if QUICKSTART.is_dir() else None)
    if folder is None:
        return None
    blocks = TokenBlocks(folder, "train", training.length)
    if len(blocks) < training.blocks:
        raise SystemExit(f"{folder} has {len(blocks)} blocks, but the training needs {training.blocks}")
    return blocks.__getitems__(list(range(training.blocks)))["input_ids"]


def most_frequent(blocks: Tensor, size: int) -> Tensor:
    """The same text with a vocabulary of `size`: ids by frequency, and one for all the rarer tokens."""
    counts = torch.bincount(blocks.flatten())
    rank = torch.empty_like(counts)
    rank[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
    return rank[blocks].clamp_(max=size - 1)


def gradients(shape: dict, rank: int, blocks: Tensor, training: Training, work: Path | None) -> list[Layer]:
    """The target layers after `training`, in float32 on the CPU; from `work`, if they lie there."""
    described = f"{sorted(shape.items())} {rank} {training} {hashlib.sha256(blocks.numpy().tobytes()).hexdigest()}"
    kept = work and work / f"gradients_{hashlib.sha256(described.encode()).hexdigest()[:12]}.pt"
    if not (kept and kept.exists()):
        layers = _train(shape, rank, blocks, training)
        if not kept:
            return layers
        work.mkdir(parents=True, exist_ok=True)
        torch.save([vars(layer) for layer in layers], kept)
    return [Layer(**layer) for layer in torch.load(kept, weights_only=True)]


def _train(shape: dict, rank: int, blocks: Tensor, training: Training) -> list[Layer]:
    """GaLore with AdamW and a rate that rises over the first fifth."""
    torch.manual_seed(training.seed)
    config = LlamaConfig(**{**shape, "vocab_size": int(blocks.max()) + 1, "pad_token_id": None})
    model = LlamaForCausalLM(config).train()
    targets = {f"{name}.weight" for name in target_linears(model, ["attn", "attention", "mlp"])}
    named = list(model.named_parameters())
    projected = [(name, param) for name, param in named if name in targets]
    optimizer = LowRankOptimizer(
        [
            {"params": [(name, param) for name, param in named if name not in targets]},
            {"params": projected, "rank": rank, "update_proj_gap": training.gap, "scale": 0.25},
        ],
        lr=training.lr,
    )
    losses = []
    for update, batch in enumerate(blocks.split(training.batch_size)):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        losses.append(loss.item())
        if update >= training.updates:
            (loss / training.last_batches).backward()
            continue
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = training.lr * min(1.0, (update + 1) / (0.2 * training.updates))
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {training.updates} updates: loss {losses[0]:.2f} -> {losses[-1]:.2f}", file=sys.stderr, flush=True)
    return [
        Layer(param.detach().clone(), param.grad.clone(), optimizer.subspaces[param].bases(optimizer.state[param]))
        for _, param in projected
    ]


def load(
    name: str, blocks: Tensor | None, training: Training, work: Path | None, device: torch.device, dtype: torch.dtype
) -> LayerSet:
    """A set of layers, with gradients of a training on `blocks` or, without, Gaussian ones."""
    if name == "llama_60m":
        title, rank, shape = "target layers of llama_60m", 128, model_shape(PROJECT / "configs" / "llama_60m.json")
    else:
        title, rank = "target layers of one block of llama_1b", 512
        shape = model_shape(PROJECT / "configs" / "llama_1b.json", num_hidden_layers=1)
        blocks = blocks if blocks is None else most_frequent(blocks, 4096)
    if blocks is not None:
        layers = gradients(shape, rank, blocks, training, work)
    else:
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        of_block = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        layers = [gaussian_layer(*of_weight, rank) for of_weight in of_block * shape["num_hidden_layers"]]
    return LayerSet(name, title, rank, [layer.to(device, dtype) for layer in layers], blocks is not None)


def gaussian_layer(m: int, n: int, rank: int) -> Layer:
    generator = torch.Generator().manual_seed(m * n)
    (side,) = Projection.for_weight("std", rank, torch.Size((m, n))).sides
    basis = random_stiefel(m if side == LEFT else n, rank, generator).float()
    weight, grad = (scale * torch.randn(m, n, generator=generator) for scale in (0.02, 0.001))
    return Layer(weight, grad, {side: basis if side == LEFT else basis.T.contiguous()})


def model_shape(path: Path, **changes: int) -> dict:
    """The settings of a model JSON, some of them changed."""
    return {**json.loads(path.read_text()), **changes}
