"""Names for what `settings.every_one` tries: every method, update rule and option that has kernels of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft_pretraining.methods import METHODS

RANK = {"rank": 128}
GALORE = {"method": "galore", **RANK, "update_proj_gap": 4}
FEW = ("full_rank, adamw", "galore, adamw, per layer", "golore_adapter, adamw")


def settings(quick: bool) -> dict[str, dict[str, Any]]:
    """By name: two dozen settings; the few of --quick with a rank for tiny matrices."""
    found = dict(_all())
    if quick:
        found = {name: {**found[name], **({"rank": 4} if "rank" in found[name] else {})} for name in FEW}
    return found


def _all() -> Iterator[tuple[str, dict[str, Any]]]:
    for spec in METHODS.values():
        rules = [rule for rule in spec.update_rules if rule != "adam_zero"]
        shown = rules if spec.name in ("full_rank", "galore") else rules[:1]
        own = {"method": spec.name, **{name: spec.tiny[name] for name in spec.tiny if name != "rank"}}
        own |= {name: value for name, value in (("rank", 128), ("update_proj_gap", 4)) if name in spec.own}
        for rule in shown:
            yield f"{spec.name}, {rule}", {**own, "optimizer": rule, **_rate(rule)}
    yield "full_rank, float32", {"method": "full_rank", "precision": "fp32"}
    for precision in ("bf16", "bf16_sr"):
        yield f"galore, {precision}", {**GALORE, "precision": precision}
    yield "full_rank, activation checkpointing", {"method": "full_rank", "activation_checkpointing": True}
    yield "full_rank, accumulation 2", {"method": "full_rank", "batch_size": 32, "total_batch_size": 64}
    yield "galore, adamw, per layer", {**GALORE, "per_layer": True}
    yield "galore, adamw8bit, per layer", {**GALORE, "optimizer": "adamw8bit", "per_layer": True}
    yield "galore, randomized", {**GALORE, "svd_method": "randomized"}
    yield "galore, full", {**GALORE, "proj_type": "full"}
    for bits in ("8bit", "4bit"):
        yield f"lora, {bits} weights", {"method": "lora", **RANK, "quantize": bits}


def _rate(rule: str) -> dict[str, Any]:
    return {"lion": {"lr": 3e-4}, "sgd": {"lr": 0.1}}.get(rule, {})
