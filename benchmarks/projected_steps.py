"""Times of projected updates of GaLore and Online Subspace Descent, and of their refreshes: part of optimizer_step.py.

They stand next to the matrix products that they cannot do without. In every round everything takes its turn, so that a
machine that slows down slows all of it; the slow SVDs run in the first `--slow_rounds` rounds only. Ratios are medians
over rounds. Refreshes are of gradients from a backward on real text after `--updates` updates of training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import real_gradients
import torch
from real_gradients import LayerSet, Training, gaussian_layer
from torch import Tensor, nn

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.basis.bases import Refresh
from peft_pretraining.optim.tensors.projection import LEFT, Bases
from peft_pretraining.training.profiling import peak_memory_bytes

PRODUCTS, PLAIN, OSD, FUSED = "two products per layer", "plain update", "OSD's update", "torch's fused AdamW"
REFRESHES = {"exact": "exact", "gram": "gram", "randomized": "randomized, warm", "randomized_cold": "randomized, cold"}
"""Refreshes by name: an `svd_method`, and whether there is a basis to start from, which only `randomized` reads."""
WANTED = {"llama_60m": {"plain": 1.3, "osd": 1.8, "svd": 20}, "block_1b": {"plain": 1.1, "osd": 1.8, "svd": 10}}
ENERGY_WANTED = 0.99


@dataclass
class Contender:
    run: Callable[[], None]
    prepare: Callable[[], None] = lambda: None
    """Before every run, and not timed."""
    slow: bool = False
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    added_bytes: int = 0
    """Of the peak, what was allocated during the run."""


def report(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Updates and refreshes of projections, by set of layers."""
    settings = ("updates", "gap", "batch_size", "length", "last_batches")
    training = Training(**{name: getattr(arguments, name) for name in settings})
    blocks = real_gradients.read_blocks(arguments, training)
    found = {}
    for name in arguments.sets:
        layer_set = real_gradients.load(name, blocks, training, arguments.work, device, dtype)
        contenders = all_contenders(layer_set, arguments.full_matrices)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        take_turns(contenders, arguments.rounds, arguments.slow_rounds, device, clock)
        found[name] = summary(layer_set, contenders) | {"quality": quality(layer_set)}
        print_set(found[name])
        del layer_set, contenders
    return found


def all_contenders(layers: LayerSet, full_matrices: bool) -> dict[str, Contender]:
    params = [nn.Parameter(layer.weight.clone()) for layer in layers.layers]
    for param, layer in zip(params, layers.layers, strict=True):
        param.grad = layer.grad
    found = {PRODUCTS: Contender(two_products(layers))}
    found[PLAIN] = Contender(projected(params, layers, update_proj_gap=0)[0].step)
    found[OSD] = Contender(projected(params, layers, proj_type="continuous")[0].step)
    found[FUSED] = Contender(torch.optim.AdamW(params, lr=1e-5, fused=True).step)
    for name, label in REFRESHES.items():
        optimizer, make_due = projected(params, layers, svd_method=name.removesuffix("_cold"))
        warm = not name.endswith("_cold")
        found[f"refresh: {label}"] = Contender(refresh(optimizer, layers, warm), slow=name == "exact")
        found[f"update with refresh: {label}"] = Contender(
            optimizer.step, lambda make_due=make_due, warm=warm: make_due(warm), slow=name == "exact"
        )
    for full in (False, True)[: 1 + full_matrices]:
        found[svd_label(full)] = Contender(full_svd(layers, full), slow=True)
    return found


def svd_label(full_matrices: bool) -> str:
    return f"torch.linalg.svd per layer, {'square U and V' if full_matrices else 'full_matrices=False'}"


def two_products(layers: LayerSet) -> Callable[[], None]:
    """R = G Qᵀ and R Q, or Pᵀ G and P R, into memory that is there already."""
    work = []
    for layer, projection in zip(layers.layers, layers.projections(), strict=True):
        low_rank = layer.grad.new_empty(projection.low_rank_shape(layer.grad.shape))
        work.append((layer.grad, next(iter(layer.start.values())), LEFT in layer.start, low_rank, layer.grad.clone()))

    def run() -> None:
        for grad, basis, left, low_rank, update in work:
            if left:
                torch.mm(basis, torch.mm(basis.T, grad, out=low_rank), out=update)
            else:
                torch.mm(torch.mm(grad, basis.T, out=low_rank), basis, out=update)

    return run


def projected(
    params: list[nn.Parameter], layers: LayerSet, svd_method: str = "gram", **settings: Any
) -> tuple[LowRankOptimizer, Callable[[bool], None]]:
    """An optimizer with the bases to start from in place, and what puts it back there with a refresh due."""
    group = {"params": params, "rank": layers.rank, "update_proj_gap": 200, "scale": 0.25, **settings}
    optimizer = LowRankOptimizer([group], lr=1e-5, svd_method=svd_method)

    def put_back(warm: bool, last_refresh: int = -1) -> None:
        for param, layer in zip(params, layers.layers, strict=True):
            state = optimizer.state[param]
            state["last_refresh"].fill_(last_refresh)
            state["refreshes"].fill_(int(warm))
            for side, basis in layer.start.items():
                state[side].copy_(basis)

    put_back(warm=True, last_refresh=0)
    return optimizer, put_back


def refresh(optimizer: LowRankOptimizer, layers: LayerSet, warm: bool) -> Callable[[], list[Bases]]:
    """The new bases of all layers, without an update."""
    subspaces = list(optimizer.subspaces.values())

    def run() -> list[Bases]:
        return [
            subspace.rule.compute_basis(
                Refresh(0, int(warm), 0, str(place), layer.grad, subspace.projection, layer.start),
            )
            for place, (subspace, layer) in enumerate(zip(subspaces, layers.layers, strict=True))
        ]

    return run


def full_svd(layers: LayerSet, full_matrices: bool) -> Callable[[], None]:
    def run() -> None:
        for layer in layers.layers:
            torch.linalg.svd(in_float32(layer.grad), full_matrices=full_matrices)

    return run


def take_turns(
    contenders: dict[str, Contender], rounds: int, slow_rounds: int, device: torch.device, clock: Callable[[], float]
) -> None:
    """Measure everything once a round, after a first one that only warms up what is fast."""
    for number in range(-1, max(rounds, slow_rounds)):
        for contender in contenders.values():
            if contender.slow and not 0 <= number < slow_rounds:
                continue
            contender.prepare()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
            began = clock()
            contender.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = clock() - began
            if number >= 0:
                contender.seconds.append(seconds)
            if device.type == "cuda":
                contender.peak_bytes = max(contender.peak_bytes, peak_memory_bytes(device))
                contender.added_bytes = max(contender.added_bytes, peak_memory_bytes(device) - held)


def quality(layers: LayerSet) -> dict[str, dict[str, dict[str, float]]]:
    """Captured energy by refresh, relative to the exact SVD's: mean and least over layers."""
    shapes = {tuple(layer.grad.shape): layer for layer in layers.layers}  # a Gaussian of each shape tells enough
    gaussian = []
    for m, n in shapes:
        gaussian.append(gaussian_layer(m, n, layers.rank).to(layers.layers[0].grad.device, layers.layers[0].grad.dtype))
    sets = {"gaussian": LayerSet("", "", layers.rank, gaussian, False)} | ({"real": layers} if layers.real else {})
    return {kind: _quality(of) for kind, of in sets.items()}


def _quality(layers: LayerSet) -> dict[str, dict[str, float]]:
    best = []
    for layer in layers.layers:
        squares = torch.linalg.svdvals(in_float32(layer.grad)).square()
        best.append(squares[: layers.rank].sum() / squares.sum())
    params = [nn.Parameter(layer.weight) for layer in layers.layers]
    found = {"energy of exact": spread([each.item() for each in best])}
    for name in REFRESHES:
        method, _, cold = name.partition("_")
        if method == "exact":
            continue
        optimizer, _ = projected(params, layers, svd_method=method)
        captured = []
        new = refresh(optimizer, layers, not cold)()
        for layer, projection, bases in zip(layers.layers, layers.projections(), new, strict=True):
            grad = in_float32(layer.grad)
            captured.append(projection.project(bases, grad).square().sum() / grad.square().sum())
        found[name] = spread([(one / other).item() for one, other in zip(captured, best, strict=True)])
    return found


def in_float32(grad: Tensor) -> Tensor:
    """Or in float64, if it is."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "min": min(values)}


def summary(layers: LayerSet, contenders: dict[str, Contender]) -> dict[str, Any]:
    """Times in milliseconds, peak memory, and the ratios (median, least and largest over the rounds of both)."""
    wanted = WANTED[layers.name]
    pairs = {"plain update / products": (PLAIN, PRODUCTS, f"<= {wanted['plain']}")}
    pairs["OSD's update / plain update"] = (OSD, PLAIN, f"<= {wanted['osd']}")
    for label in REFRESHES.values():
        target = "" if label == "exact" else f">= {wanted['svd']}"
        pairs[f"full SVD / refresh: {label}"] = (svd_label(False), f"refresh: {label}", target)
    ratios = {}
    for name, (above, below, target) in pairs.items():
        each = [a / b for a, b in zip(contenders[above].seconds, contenders[below].seconds, strict=False)]
        if each:
            ratios[name] = {"median": statistics.median(each), "min": min(each), "max": max(each), "wanted": target}
    return {
        "title": f"{layers.title}: {len(layers.layers)} matrices, rank {layers.rank}",
        "gradients": "real" if layers.real else "gaussian",
        "milliseconds": {name: [1000 * each for each in one.seconds] for name, one in contenders.items()},
        "peak_bytes": {name: one.peak_bytes for name, one in contenders.items() if one.peak_bytes},
        "added_bytes": {name: one.added_bytes for name, one in contenders.items() if one.peak_bytes},
        "ratios": ratios,
    }


def print_set(result: dict[str, Any]) -> None:
    print(f"\n{result['title']}, {result['gradients']} gradients\n{'':52}{'median ms':>10}   range")
    for name, times in result["milliseconds"].items():
        if times:
            line = f"  {name:50}{statistics.median(times):10,.1f}   {min(times):,.1f} to {max(times):,.1f}"
            if name in result["peak_bytes"]:
                peak, added = (result[key][name] / 2**20 for key in ("peak_bytes", "added_bytes"))
                line += f"   peak {peak:,.0f} MiB, {added:,.0f} of it in the run"
            print(line)
    print(f"  {'ratios':50}{'median':>10}   range")
    for name, ratio in result["ratios"].items():
        wanted = f"   (wanted: {ratio['wanted']})" if ratio["wanted"] else ""
        print(f"  {name:50}{ratio['median']:10.2f}   {ratio['min']:.2f} to {ratio['max']:.2f}{wanted}")
    print(f"  {'captured energy, relative to the exact SVD':50}{'mean':>10}   least of a layer")
    for kind, of in result["quality"].items():
        for name, energy in of.items():
            target = f"   (wanted: >= {ENERGY_WANTED})" if kind == "real" and name in REFRESHES else ""
            label = f"{kind} gradient, {REFRESHES.get(name, name)}"
            print(f"  {label:50}{energy['mean']:10.4f}   {energy['min']:.4f}{target}")
    sys.stdout.flush()
