"""Times of a refresh of all layers, by the way of computing bases, next to a full SVD of each matrix.

    python benchmarks/refresh.py --sets 60m block_1b --threads 1 --data FOLDER    # or --text FILE --tokenizer DIR
    python benchmarks/refresh.py --sets 60m 1b 7b --device cuda --dtype bfloat16

`60m`: the target layers of llama_60m at rank 128; `block_1b` and `block_7b`: those of one decoder layer at rank 512
and 1024; `1b` and `7b`: as many as the models have, for devices. Gradients come from a training
on real text where there is one (60m and 1b), and are otherwise made: singular values that fall as a power of their
number, in bases that were disturbed since the refresh before. In each round everything takes its turn; medians over
rounds. `alone`: one call for each matrix, as with updates inside the backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import real_gradients
import torch
from real_gradients import Layer, Training
from torch import Tensor

from peft_pretraining.optim.basis.bases import Refresh, SVDBasis
from peft_pretraining.optim.tensors.collectives import run
from peft_pretraining.optim.tensors.full_precision import full_float32_products
from peft_pretraining.optim.tensors.projection import Bases, Projection

SETS = {  # model JSON, rank, decoder layers (None: all, with a gradient of each), copies of them
    "60m": ("llama_60m", 128, None, 1),
    "block_1b": ("llama_1b", 512, 1, 1),
    "1b": ("llama_1b", 512, 1, 24),
    "block_7b": ("llama_7b", 1024, 1, 1),
    "7b": ("llama_7b", 1024, 1, 32),
}
TRAINED = {"60m": "llama_60m", "block_1b": "block_1b", "1b": "block_1b"}
"""What `real_gradients` calls those that can be trained on a CPU."""
METHODS = ("exact", "gram", "randomized", "subspace")
KINDS = {"randomized": ("warm", "cold"), "subspace": ("warm", "warm, alone", "cold")}
SVD = "torch.linalg.svd of each"
_DECAY, _DISTURBED = 0.7, 0.05


def main() -> None:
    arguments = parse()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = ("updates", "gap", "batch_size", "length", "last_batches")
    training = Training(**{name: getattr(arguments, name) for name in settings})
    blocks = real_gradients.read_blocks(arguments, training)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, {dtype}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for name in arguments.sets:
        layers, rank, kind = load(name, blocks, training, arguments.work, device, dtype)
        print(f"\n{name}: {len(layers)} matrices, rank {rank}, {kind} gradients", flush=True)
        report(layers, rank, arguments, device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["60m", "block_1b"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["gram", "randomized", "subspace"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--svd_rounds", type=int, default=1, help="rounds with full SVDs, too; 0: without")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds, for a busy machine; with --threads 1")
    real_gradients.add_flags(parser)
    return parser.parse_args()


def load(
    name: str, blocks: Tensor | None, training: Training, work: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[list[Layer], int, str]:
    """Layers with gradients, the rank of their bases, and where the gradients come from."""
    model, rank, depth, copies = SETS[name]
    if blocks is not None and name in TRAINED:
        layers, kind = real_gradients.load(TRAINED[name], blocks, training, work, device, dtype).layers, "real"
    else:
        shape = real_gradients.model_shape(real_gradients.PROJECT / "configs" / f"{model}.json")
        m, n = shape["hidden_size"], shape["intermediate_size"]
        of_block = [(m, m)] * 4 + [(n, m)] * 2 + [(m, n)]
        depth = shape["num_hidden_layers"] if depth is None else depth
        layers, kind = [made(*size, rank, device, dtype, seed) for seed, size in enumerate(of_block * depth)], "made"
    return [Layer(each.weight, each.grad.clone(), each.start) for _ in range(copies) for each in layers], rank, kind


def made(m: int, n: int, rank: int, device: torch.device, dtype: torch.dtype, seed: int) -> Layer:
    """A gradient whose singular values fall as a power of their number, and the basis of one a bit different."""
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    values = torch.arange(1, min(m, n) + 1, device=device) ** -_DECAY
    grad = (drawn(m, min(m, n)) * values) @ drawn(min(m, n), n) / (m * n) ** 0.5  # nearly orthogonal factors
    other = grad + _DISTURBED * grad.norm() / (m * n) ** 0.5 * drawn(m, n)
    projection = Projection.for_weight("std", rank, torch.Size((m, n)))
    start = SVDBasis("gram").compute_basis(Refresh(0, 0, 0, "", other, projection, {}))
    return Layer(grad.new_zeros(m, n).to(dtype), grad.to(dtype), {key: basis.to(dtype) for key, basis in start.items()})


def report(layers: list[Layer], rank: int, arguments: argparse.Namespace, device: torch.device) -> None:
    """Measures, and prints a table."""
    contenders = {}
    for method in arguments.methods:
        for kind in KINDS.get(method, ("cold",)):
            contenders[f"{method}, {kind}"] = refresh(layers, rank, method, kind)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in (SVD, *contenders)}
    for number in range(-1, max(arguments.rounds, arguments.svd_rounds)):
        for name, act in contenders.items():
            seconds = timed(act, device, clock)
            if 0 <= number < arguments.rounds:
                times[name].append(seconds)
        if 0 <= number < arguments.svd_rounds:
            times[SVD].append(timed(lambda: full_svds(layers), device, clock))
    best = energies(layers, rank, None)
    print(f"| {'':28} |   ms | full SVDs / this | energy relative to exact, mean | least |\n|---|--:|--:|--:|--:|")
    svd = statistics.median(times[SVD]) if times[SVD] else float("nan")
    if times[SVD]:
        print(f"| {SVD:28} | {1000 * svd:,.0f} | 1 | 1 | 1 |")
    for name, act in contenders.items():
        median, captured = statistics.median(times[name]), energies(layers, rank, act())
        shares = [mine / other for mine, other in zip(captured, best, strict=True)]
        print(
            f"| {name:28} | {1000 * median:,.1f} | {svd / median:.1f} | {statistics.mean(shares):.6f} "
            f"| {min(shares):.6f} |",
            flush=True,
        )


def refresh(layers: list[Layer], rank: int, method: str, kind: str) -> Callable[[], list[Bases]]:
    """New bases of all layers, from those in use or from nothing, in one call or in one for each."""
    rule, number = SVDBasis(method), int(kind != "cold")
    refreshes = [
        Refresh(0, number, 0, str(place), layer.grad, Projection.for_weight("std", rank, layer.grad.shape), layer.start)
        for place, layer in enumerate(layers)
    ]

    @full_float32_products()
    def compute() -> list[Bases]:
        if kind.endswith("alone"):
            return [rule.compute_basis(each) for each in refreshes]
        return [found for found in run(rule.compute_bases(refreshes)) if isinstance(found, dict)]

    return compute


def full_svds(layers: list[Layer]) -> None:
    for layer in layers:
        torch.linalg.svd(layer.grad.to(torch.promote_types(layer.grad.dtype, torch.float32)), full_matrices=False)


def timed(act: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def energies(layers: list[Layer], rank: int, bases: list[Bases] | None) -> list[float]:
    """‖R‖² of each gradient in the bases, or, without any, the most that a basis can capture."""
    found = []
    for place, layer in enumerate(layers):
        grad = layer.grad.double()
        if bases is None:
            found.append(torch.linalg.svdvals(grad)[:rank].square().sum().item())
        else:
            projection = Projection.for_weight("std", rank, grad.shape)
            wide = {side: basis.double() for side, basis in bases[place].items()}
            found.append(projection.project(wide, grad).square().sum().item())
    return found


if __name__ == "__main__":
    main()
