"""Seconds that the start of a run takes: drawing weights and random bases in threads, and everything else.

    python benchmarks/start.py --model_config configs/llama_7b.json --rank 1024 --threads 1 2 --method galore

Weights and bases of two decoder layers are drawn, as many times as there are numbers of threads, and multiplied by the
number of layers; what remains (modules, replaced layers, parameter groups, state) is timed with all layers at a hidden
size of 64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from real_updates import config_of  # noqa: E402

from peft_pretraining.distributed import ProcessGroup  # noqa: E402
from peft_pretraining.methods import load_method  # noqa: E402
from peft_pretraining.models.initial_weights import initialize  # noqa: E402
from peft_pretraining.optim.basis import svd_basis  # noqa: E402
from peft_pretraining.optim.basis.bases import RandomBasis, Refresh  # noqa: E402
from peft_pretraining.optim.tensors.projection import Projection  # noqa: E402
from peft_pretraining.training.build_model import distributed_model  # noqa: E402

DRAWN_LAYERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_config", default="configs/llama_7b.json")
    parser.add_argument("--method", default="galore")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    shape = json.loads(Path(args.model_config).read_text())
    layers = shape["num_hidden_layers"]
    print(f"modules, groups and state of {layers} small layers, {args.method}: {build(args.method, shape):.2f} s")
    matrices, table = shapes_of(shape), 2 * shape["vocab_size"] * shape["hidden_size"]
    for threads in args.threads:
        drawn = weights(matrices, getattr(torch, args.dtype), threads)
        report(f"weights, {threads} thread(s)", drawn, drawn.numbers * layers // DRAWN_LAYERS + table)
        drawn = bases(matrices, args.rank, threads)
        report(f"what random bases are made of, {threads} thread(s)", drawn, drawn.numbers * layers // DRAWN_LAYERS)


class Drawn(NamedTuple):
    seconds: float
    cpu_seconds: float
    """Of all threads: on a machine that does other things, too, what one thread would have needed alone."""
    numbers: int


def report(what: str, drawn: Drawn, total: int) -> None:
    """A line with the rate, and what all of the model would take."""
    rate, cpu_rate = (drawn.numbers / seconds / 1e6 for seconds in drawn[:2])
    print(
        f"{what}: {rate:,.0f}M numbers/s, {cpu_rate:,.0f}M a CPU second; "
        f"{total / 1e9:.2f}G would take {total / rate / 1e6:.1f} s, {total / cpu_rate / 1e6:.1f} CPU seconds"
    )


def shapes_of(shape: dict[str, Any]) -> list[tuple[int, int]]:
    """Of the matrices that are drawn."""
    m, n = shape["hidden_size"], shape["intermediate_size"]
    return DRAWN_LAYERS * [*(4 * [(m, m)]), *(2 * [(n, m)]), (m, n)]


def weights(matrices: list[tuple[int, int]], dtype: torch.dtype, threads: int) -> Drawn:
    params = {str(index): nn.Parameter(torch.zeros(size, dtype=dtype)) for index, size in enumerate(matrices)}
    began, cpu = time.perf_counter(), time.process_time()
    initialize(params, 0.02, seed=0, threads=threads)
    numbers = sum(param.numel() for param in params.values())
    return Drawn(time.perf_counter() - began, time.process_time() - cpu, numbers)


def bases(matrices: list[tuple[int, int]], rank: int, threads: int) -> Drawn:
    """Gaussian matrices alone: their QR decomposition is the device's."""
    refreshes = []
    for index, size in enumerate(matrices):
        projection = Projection.for_weight("std", rank, torch.Size(size))
        refreshes.append(Refresh(0, 0, 0, str(index), torch.zeros(1), projection, {}))
    drawn: list[int] = []

    def counted(matrix: torch.Tensor, device: object = None) -> torch.Tensor:
        drawn.append(matrix.numel())
        return matrix

    svd_basis.on_stiefel, svd_basis.share_of_cores = counted, lambda: threads  # type: ignore[assignment]
    began, cpu = time.perf_counter(), time.process_time()
    RandomBasis().compute_bases(refreshes)
    return Drawn(time.perf_counter() - began, time.process_time() - cpu, sum(drawn))


def build(method: str, shape: dict[str, Any]) -> float:
    """Seconds for a model with all of its layers, of hidden size 64, and its optimizer."""
    small = {**shape, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 512}
    config, group = config_of(method, "ddp", rank=16), ProcessGroup.start()
    began = time.perf_counter()
    made = load_method(method)(config)
    made.build_optimizer(distributed_model(config, small, made, group))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
