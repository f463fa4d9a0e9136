"""Tokens per second, and what an update waits for and launches."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ..lines import Lines
from ..scene import Scene
from ..trainee import Trainee, settings_of
from .planned import Expected, simulated

KINDS: dict[str, dict[str, Any]] = {
    "full_rank": {"method": "full_rank"},
    "galore": {"method": "galore", "update_proj_gap": 1000},
    "galore per layer": {"method": "galore", "update_proj_gap": 1000, "per_layer": True},
    "golore": {"method": "golore", "update_proj_gap": 1000},
    "online_subspace_descent": {"method": "online_subspace_descent", "proj_type": "continuous"},
    "switchlora": {"method": "switchlora", "lora_alpha": 1.0, "init_lora_type": "switchlora"},
    "lora": {"method": "lora"},
    "golore_adapter": {"method": "golore_adapter", "update_proj_gap": 1000},
}
FAST = {"precision": "bf16", "compile": "on", "fused_loss": "on"}
PLAIN = {"precision": "bf16", "compile": "off"}
"""For what is compared with the simulation, which counts operators one by one."""


@dataclass(frozen=True)
class Case:
    """One model, with a batch that fills the device."""

    rank: int
    batch: int
    needs: float
    """GiB, full-rank and compiled."""
    kinds: tuple[str, ...]
    least_tokens: float = 0.0
    """Per second, full-rank, on an H100 or H200."""
    least_mfu: float = 0.0
    """The share of 989 TFLOP/s, on these."""


FASTER_THAN_FULL_RANK = ("full_rank", "galore", "galore per layer", "golore")
CASES = {
    "60m": Case(128, 256, 16, tuple(KINDS), least_tokens=1.2e6),
    "350m": Case(256, 64, 20, FASTER_THAN_FULL_RANK, least_mfu=0.45),
    "1b": Case(512, 32, 24, FASTER_THAN_FULL_RANK, least_mfu=0.5),
}
RATIOS: dict[str, dict[str, float]] = {
    "60m": {"galore": 1.0, "golore": 1.0, "online_subspace_descent": 0.9, "switchlora": 0.9},
    "350m": {"galore": 1.08, "golore": 1.08},
    "1b": {"galore": 1.08, "golore": 1.08},
}
"""Of compiled full-rank training's speed in the same process."""
PER_LAYER = 0.95
"""Of galore's speed without per-layer updates."""
DENSE = 989e12
"""FLOP/s of bfloat16 products on an H100 or H200."""

MORE, FURTHER_WAITS = 1.1, 2
"""Beyond the launches and waits that are simulated: an H200 had as many waits, and 6 to 14% fewer launches."""

_LAUNCHING = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def updates(scene: Scene, lines: Lines, case: str) -> None:
    if why := scene.lacks(CASES[case].needs):
        lines.absent(f"{case}: speed", why)
        return
    tokens: dict[str, float] = {}
    for name in CASES[case].kinds:
        with Trainee(_settings(scene, case, name, PLAIN if scene.quick else FAST), scene.device) as trainee:
            began = time.perf_counter()
            trainee.update()
            trainee.synchronise()
            lines.reports(f"{case} {name}: the first update, compilation included", time.perf_counter() - began, "s")
            tokens[name] = _tokens_per_second(scene, trainee)
            _speed(scene, lines, case, name, tokens, trainee)
        _empty(scene)


def launches(scene: Scene, lines: Lines, case: str) -> None:
    """What an update of 60M launches and waits for, eager, and its speed."""
    if why := scene.lacks(10):
        lines.absent("60m: launches", why)
        return
    for name in case.split(","):
        settings = {**_settings(scene, "60m", name, PLAIN), "batch_size": scene.size(64, 4)}
        expected = simulated(scene, settings)
        with Trainee(settings, scene.device) as trainee:
            lines.reports(f"60m {name}, eager", _tokens_per_second(scene, trainee), "tokens/s")
            _waits_and_launches(scene, lines, name, trainee, expected)
        _empty(scene)


def _empty(scene: Scene) -> None:
    if scene.on_cuda:
        torch.cuda.empty_cache()


def _settings(scene: Scene, case: str, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    rank = {} if name == "full_rank" else {"rank": scene.size(CASES[case].rank, 4)}
    size = {"batch_size": scene.size(CASES[case].batch, 4)}
    return settings_of(scene, case, name.replace(" ", "_"), **{**size, **changes, **KINDS[name], **rank})


def _speed(scene: Scene, lines: Lines, case: str, name: str, tokens: dict[str, float], trainee: Trainee) -> None:
    judged, what = scene.on_cuda and not scene.quick, f"{case} {name}, compiled"
    if name != "full_rank":
        _compare(
            lines, judged, f"{what}: speed, of full_rank's", tokens[name] / tokens["full_rank"], RATIOS[case].get(name)
        )
        if name == "galore per layer":
            _compare(lines, judged, f"{what}: speed, of galore's", tokens[name] / tokens["galore"], PER_LAYER)
        return
    judged = judged and is_known(scene)
    _compare(lines, judged, f"{what}: tokens/s", tokens[name], CASES[case].least_tokens or None)
    mfu = tokens[name] * flops_per_token(trainee.run.model, scene.length) / DENSE
    _compare(lines, judged, f"{what}: share of {DENSE / 1e12:.0f} TFLOP/s", mfu, CASES[case].least_mfu or None)


def _compare(lines: Lines, judged: bool, what: str, seen: float, least: float | None) -> None:
    if judged and least is not None:
        lines.at_least(what, seen, least)
    else:
        lines.reports(what, seen)


def flops_per_token(model: torch.nn.Module, length: int) -> float:
    """Of full-rank training: six for each weight that multiplies, and attention (arXiv 2204.02311, appendix B)."""
    shape: Any = model.config
    multiplied = sum(param.numel() for param in model.parameters()) - shape.vocab_size * shape.hidden_size
    return 6.0 * multiplied + 12.0 * shape.num_hidden_layers * shape.hidden_size * length


def is_known(scene: Scene) -> bool:
    """Whether the speeds of this card are known."""
    return any(name in torch.cuda.get_device_name(scene.device) for name in ("H100", "H200"))


def _tokens_per_second(scene: Scene, trainee: Trainee) -> float:
    count, times = scene.size(5, 1), []
    for turn in range(5):
        trainee.synchronise()
        began, before = time.perf_counter(), trainee.run.state.tokens_seen
        for _ in range(count):
            trainee.launch()
        trainee.synchronise()
        read = trainee.run.state.tokens_seen - before
        if turn:  # kernels are chosen and bases taken in the first
            times.append(read / (time.perf_counter() - began))
    return statistics.median(times)


def _waits_and_launches(scene: Scene, lines: Lines, name: str, trainee: Trainee, expected: Expected) -> None:
    counts = profiled(trainee, scene.on_cuda)
    if not scene.on_cuda:
        lines.reports(f"60m {name}: launches of an update on a GPU, simulated", expected.launches)
        lines.reports(f"60m {name}: waits for the device in it, simulated", expected.waits)
        return
    launches = sum(counts.get(each, 0) for each in _LAUNCHING)
    waits = sum(counts.get(each, 0) for each in _WAITING)
    if launches:
        lines.at_most(f"60m {name}: launches of an update", launches, expected.launches * MORE)
        lines.at_most(f"60m {name}: waits for the device in an update", waits, expected.waits + FURTHER_WAITS)
    else:
        lines.absent(f"60m {name}: launches of an update", "the profiler sees no kernels (is CUPTI allowed?)")
    lines.at_most(f"60m {name}: calls that torch knows to wait", waiting_calls(trainee), expected.waits + FURTHER_WAITS)


def profiled(trainee: Trainee, on_cuda: bool) -> dict[str, int]:
    """How often an update called what, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    trainee.synchronise()
    with torch.profiler.profile(activities=activities) as profiler:
        trainee.launch()
    return {event.key: event.count for event in profiler.key_averages()}


def waiting_calls(trainee: Trainee) -> int:
    """Warnings of `torch.cuda.set_sync_debug_mode` in an update."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainee.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)
