"""What a dozen settings cost on a GPU, simulated, and what they cost when footprint.json was last written.

    python tests/footprint.py            # the differences
    python tests/footprint.py --write    # take the numbers of today for those to keep

Two layers of LLaMA 60M's width, so that a matrix, the vocabulary and the number of parameters per layer are those of a
real run.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).with_name("footprint.json")
MIB = 2**20

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
}
_SWITCHLORA = {"lora_alpha": 1.0, "init_lora_type": "switchlora"}
SETTINGS: dict[str, dict[str, Any]] = {
    "full_rank bf16": {"method": "full_rank", "precision": "bf16"},
    "full_rank mixed": {"method": "full_rank", "precision": "mixed"},
    "full_rank bf16_sr": {"method": "full_rank", "precision": "bf16_sr"},
    "full_rank plain head": {"method": "full_rank", "precision": "bf16", "fused_loss": "off"},
    "full_rank adamw8bit": {"method": "full_rank", "precision": "bf16", "optimizer": "adamw8bit"},
    "galore": {"method": "galore", "precision": "bf16"},
    "galore bf16_sr": {"method": "galore", "precision": "bf16_sr"},
    "galore per_layer": {"method": "galore", "precision": "bf16", "per_layer": True},
    "galore per_layer 8-bit, checkpointed, 4 micro-batches": {
        "method": "galore",
        "precision": "bf16",
        "per_layer": True,
        "optimizer": "adamw8bit",
        "activation_checkpointing": True,
        "gradient_accumulation": 4,
    },
    "online_subspace_descent": {"method": "online_subspace_descent", "precision": "bf16"},
    "lora": {"method": "lora", "precision": "bf16"},
    "switchlora": {"method": "switchlora", "precision": "bf16", **_SWITCHLORA},
    "golore_adapter": {"method": "golore_adapter", "precision": "bf16"},
    "galore ddp 8": {"method": "galore", "precision": "bf16", "devices": 8},
    "galore fsdp 8": {"method": "galore", "precision": "bf16", "devices": 8, "distributed_type": "fsdp"},
}
"""Flags by the name of the case; `devices` is none."""


def config_of(**settings: Any) -> Any:
    """The configuration that flags come to, without a command line."""
    from peft_pretraining.config import Config
    from peft_pretraining.methods import METHODS

    batch, accumulation = settings.pop("batch_size", 8), settings.get("gradient_accumulation", 1)
    own = {**METHODS[settings["method"]].defaults, "batch_size": batch, "gradient_accumulation": accumulation}
    if settings["method"] != "full_rank":
        own["rank"] = 128
    if settings.get("per_layer"):
        own["stagger_refresh"] = True
    own |= {"total_batch_size": batch * accumulation * settings.pop("devices", 1), "max_length": 256, **settings}
    return Config.from_settings(own)


def measure(name: str) -> dict[str, Any]:
    """Of the first update and of an ordinary one: peak in MiB, launches, waits; bytes of collectives."""
    from peft_pretraining.report.footprint.drive import Simulation

    settings = dict(SETTINGS[name])
    found: dict[str, Any] = {}
    with Simulation(config_of(**settings), SHAPE, settings.get("devices", 1)) as simulation:
        for kind, step in (("first", 0), ("ordinary", 1)):
            measured = simulation.update(step)
            found[kind] = {
                "peak_mib": round(measured.peak / MIB, 2),
                "launches": sum(measured.counts.launches().values()),
                "waits": sum(measured.counts.host_waits().values()),
                "exchanged": measured.counts.exchanged(),
            }
    return found


def versions() -> dict[str, str]:
    """Of the libraries whose operators are counted."""
    import torch
    import transformers

    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def main() -> None:
    logging.disable(logging.WARNING)
    measured = {name: measure(name) for name in SETTINGS}
    before = json.loads(EXPECTED.read_text())["cases"] if EXPECTED.exists() else {}
    for name, kinds in measured.items():
        for kind, numbers in kinds.items():
            old = before.get(name, {}).get(kind, {})
            for what, value in numbers.items():
                if old.get(what) != value:
                    print(f"{name}, {kind} update: {what} {old.get(what)} -> {value}")
    if "--write" in sys.argv[1:]:
        EXPECTED.write_text(json.dumps({"versions": versions(), "cases": measured}, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
