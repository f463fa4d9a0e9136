"""Times of steps that are mostly matrix products, over what their products take at this machine's matrix speed.

    python benchmarks/product_steps.py --threads 1 [--methods muon normuon soap] [--sets llama_60m block_1b]

The FLOPs of a step's products are counted as torch counts them. The matrix speed is that of one product of two 1,024 x
1,024 matrices; it takes its turn beside every step, and ratios are medians over pairs. `alone` is what the step's own
products take, replayed on matrices that lie ready: what is between it and 1 is not the step's to save.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from method_steps import SETS, Clock, Contender, stopwatch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_SIDE = 1024
_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1}
"""Products, and the place of the first factor."""


class Products(TorchDispatchMode):
    """The products that are called while it is active, with matrices of the same shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., object], Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = _FACTORS.get(func._opname)
        if place is not None:
            one, other = args[place : place + 2]
            self.calls.append((torch.bmm if one.ndim == 3 else torch.mm, one.detach(), other.detach()))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        for multiply, one, other in self.calls:
            multiply(one, other)


def measure(name: str, which: str, rounds: int, seconds: Clock, device: torch.device, dtype: torch.dtype) -> list[str]:
    contender = Contender(name, which, 10 * rounds + 10, device, dtype)
    one, other = torch.randn(2, _SIDE, _SIDE, device=device, dtype=dtype)
    for _ in range(2):  # bases, memory
        contender.prepare()
        contender.step()
    products = Products()
    with FlopCounterMode(display=False) as counter:
        contender.prepare()
        contender.step()
    with products:
        contender.prepare()
        contender.step()
    over_speed, over_alone, times = [], [], []
    for _ in range(rounds):
        speed = 2 * _SIDE**3 / min(seconds(lambda: one @ other) for _ in range(5))
        contender.prepare()
        times.append(seconds(contender.step))
        alone = seconds(products.replay)
        over_speed.append(times[-1] * speed / counter.get_total_flops())
        over_alone.append(times[-1] / alone)
    flops, middle = counter.get_total_flops(), statistics.median(times)
    return [
        f"{flops / 1e9:,.1f}",
        f"{1000 * middle:,.0f}",
        f"{flops / middle / 1e9:,.0f}",
        *(f"{statistics.median(ratios):.2f}" for ratios in (over_speed, over_alone)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["muon", "normuon", "soap"])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="sets of layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds, for a busy machine; with --threads 1")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    seconds = stopwatch(device, time.process_time if chosen.cpu_time else time.perf_counter)
    print("| method | layers | GFLOP | ms | GFLOP/s | over the matrix speed | over its products alone |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for which in chosen.sets:
        for name in chosen.methods:
            cells = measure(name, which, chosen.rounds, seconds, device, getattr(torch, chosen.dtype))
            print(f"| {name} | {SETS[which][0]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
