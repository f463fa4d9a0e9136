"""Bases: the decompositions behind them, how good they are, and how long an update that takes all anew waits."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..lines import Lines
from ..scene import Scene
from ..trainee import Trainee, settings_of

ENERGY = 0.999
"""Of what the exact basis of that rank captures."""
REFRESH = 0.1
"""Seconds more than an ordinary update, for all layers of 60M: an H200 took 0.34 by float64 eigenvectors."""


def bases(scene: Scene, lines: Lines, case: str) -> None:
    for size in (32, 64) if scene.quick else (512, 2048, 4096):
        _decompositions(scene, lines, size)
    own = {"rank": scene.size(128, 4), "update_proj_gap": 6, "stagger_refresh": False}
    if why := scene.lacks(10):
        lines.absent("60m galore: an update that refreshes", why)
        return
    with Trainee(settings_of(scene, "60m", "run", method="galore", **own), scene.device) as trainee:
        times = []
        for _ in range(13):
            trainee.synchronise()
            began = time.perf_counter()
            trainee.update()
            trainee.synchronise()
            times.append(time.perf_counter() - began)
    ordinary = sorted(times[1:6] + times[7:12])[5]
    more = max(0.0, min(times[6], times[12]) - ordinary)
    lines.at_most("60m galore: an update that refreshes, beyond an ordinary one", more, REFRESH, "s")


def _decompositions(scene: Scene, lines: Lines, size: int) -> None:
    matrix = _gradient_like(size, scene.device)
    gram = matrix.double() @ matrix.double().T
    rank = size // 4
    exact, seconds = _timed(lambda: torch.linalg.eigh(gram)[1][:, -rank:])
    lines.reports(f"eigh of {size} x {size} in float64", 1000 * seconds, "ms")
    single, seconds = _timed(lambda: torch.linalg.eigh(gram.float())[1][:, -rank:])
    lines.reports(f"eigh of {size} x {size} in float32", 1000 * seconds, "ms")
    share = _captured(gram, single.double()) / _captured(gram, exact)
    lines.at_least(f"energy of {rank} float32 vectors of {size}, of the float64 ones'", float(share), ENERGY)
    if size <= 512:
        stacked = gram.float().expand(8, -1, -1).contiguous()
        _, seconds = _timed(lambda: torch.linalg.eigh(stacked)[1])
        lines.reports(f"eigh of 8 x {size} x {size} in float32, each", 125 * seconds, "ms")


def _gradient_like(size: int, device: torch.device) -> Tensor:
    """A matrix whose singular values fall as a gradient's do: 1 / k."""
    generator = torch.Generator().manual_seed(size)
    left, right = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    return left * (1.0 / torch.arange(1, size + 1, device=device)) @ right / size


def _captured(gram: Tensor, vectors: Tensor) -> Tensor:
    return ((vectors.T @ gram) * vectors.T).sum() / gram.diagonal().sum()


def _timed(act: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it gives, and the seconds of its second call."""
    result, seconds = act(), 0.0
    for _ in range(2):
        if result.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = act()
        if result.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return result, seconds
