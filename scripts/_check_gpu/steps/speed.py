"""Tokens per second, and what an update waits for and launches."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ..lines import Lines
from ..scene import Scene, known_flags
from ..trainee import Trainee, settings_of
from .planned import Expected, simulated

KINDS: dict[str, dict[str, Any]] = {
    "full_rank": {"method": "full_rank"},
    "galore": {"method": "galore", "update_proj_gap": 1000},
    "galore per layer": {"method": "galore", "update_proj_gap": 1000, "per_layer": True},
}
RANKS = {"60m": 128, "350m": 256}
NEEDS = {"60m": 10, "350m": 26}
"""GiB, eager in bfloat16."""
FASTER = {"compiled": {"compile": True}, "fused head": {"fused_loss": "on"}}
"""Settings that make an update faster; a version may not have all of them yet."""
PLAIN = {"precision": "bf16", "fused_loss": "off"}
"""As the numbers below were measured."""


@dataclass(frozen=True)
class Limits:
    tokens: float
    """Per second, full-rank, eager, on an H100 or H200: nine tenths of what an H200 did are an H100's, less a tenth."""
    compiled: float
    """The same, compiled and with a fused head: the aim."""


LIMITS = {"60m": Limits(390_000, 850_000), "350m": Limits(83_000, 190_000)}
RATIO = {"galore": 0.75, "galore per layer": 0.2}
"""Of full-rank's speed at 60M, eager; an H200 had 0.82 and 0.26. Larger models wait less."""

MORE, FURTHER_WAITS = 1.1, 2
"""Beyond the launches and waits that are simulated: an H200 had as many waits, and 6 to 14% fewer launches."""

_LAUNCHING = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def updates(scene: Scene, lines: Lines, case: str) -> None:
    if why := scene.lacks(NEEDS[case]):
        lines.absent(f"{case}: speed", why)
        return
    tokens: dict[str, float] = {}
    expected = {name: simulated(scene, _settings(scene, case, name)) for name in KINDS if case == "60m"}
    for name in KINDS:
        with Trainee(_settings(scene, case, name), scene.device) as trainee:
            tokens[name] = _tokens_per_second(scene, trainee)
            _speed(scene, lines, case, name, tokens)
            if name in expected:
                _waits_and_launches(scene, lines, name, trainee, expected[name])
        if scene.on_cuda:
            torch.cuda.empty_cache()
    _faster(scene, lines, case)


def _settings(scene: Scene, case: str, name: str) -> dict[str, Any]:
    rank = {} if name == "full_rank" else {"rank": scene.size(RANKS[case], 4)}
    return settings_of(scene, case, name.replace(" ", "_"), **PLAIN, **KINDS[name], **rank)


def _speed(scene: Scene, lines: Lines, case: str, name: str, tokens: dict[str, float]) -> None:
    what = f"{case} {name}, eager"
    if name != "full_rank":
        ratio = tokens[name] / tokens["full_rank"]
        if scene.on_cuda and not scene.quick:
            lines.at_least(f"{what}: speed, of full_rank's", ratio, RATIO[name])
        else:
            lines.reports(f"{what}: speed, of full_rank's", ratio)
    elif scene.on_cuda and not scene.quick and is_known(scene):
        lines.at_least(what, tokens[name], LIMITS[case].tokens, "tokens/s")
    else:
        lines.reports(what, tokens[name], "tokens/s")


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


def _faster(scene: Scene, lines: Lines, case: str) -> None:
    """Compiled, with a fused head: where this version has them."""
    there = {name: changes for name, changes in FASTER.items() if changes.keys() <= known_flags()}
    for name in FASTER.keys() - there.keys():
        lines.absent(f"{case} full_rank, {name}", "this version has none")
    if not there:
        return
    settings = settings_of(scene, case, "faster", **{**PLAIN, "method": "full_rank"})
    for changes in there.values():
        settings |= changes
    with contextlib.ExitStack() as stack:
        trainee = stack.enter_context(Trainee(settings, scene.device))
        speed = _tokens_per_second(scene, trainee)
    what = f"{case} full_rank, {' and '.join(there)}"
    if scene.on_cuda and not scene.quick and is_known(scene) and len(there) == len(FASTER):
        lines.at_least(what, speed, LIMITS[case].compiled, "tokens/s")
    else:
        lines.reports(what, speed, "tokens/s")
