"""How much an update asks of a GPU beside its forward and backward pass, simulated on the meta device.

    python tests/launches.py            # a table: launches of gradient norm and step, waits, of 60M and 1B

Counted are operators; kernels are up to a sixth fewer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from footprint import config_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OSD = {"method": "online_subspace_descent", "proj_type": "continuous"}
LIMITS: dict[str, tuple[dict[str, Any], int, int]] = {
    "full_rank": ({"method": "full_rank"}, 40, 120),
    "full_rank adafactor": ({"method": "full_rank", "optimizer": "adafactor"}, 200, 600),
    "full_rank lion": ({"method": "full_rank", "optimizer": "lion"}, 200, 600),
    "full_rank bf16_sr": ({"method": "full_rank", "precision": "bf16_sr"}, 600, 1800),
    "galore": ({"method": "galore"}, 150, 450),
    "golore": ({"method": "golore"}, 150, 450),
    "galore per layer": ({"method": "galore", "per_layer": True}, 400, 1200),
    "osd": (OSD, 300, 900),
    "apollo": ({"method": "apollo"}, 500, 1500),
    "apollo_mini": ({"method": "apollo_mini"}, 450, 1350),
    "fira": ({"method": "fira"}, 600, 1800),
    "alice": ({"method": "alice"}, 800, 2400),
    "ldadam": ({"method": "ldadam"}, 350, 1050),
    "lora": ({"method": "lora"}, 60, 180),
    "switchlora": ({"method": "switchlora", "lora_alpha": 1.0, "init_lora_type": "switchlora"}, 300, 900),
    "golore_adapter": ({"method": "golore_adapter"}, 60, 180),
    "muon": ({"method": "muon"}, 220, 660),
    "normuon": ({"method": "normuon"}, 450, 1350),
    "soap": ({"method": "soap"}, 1100, 3300),
    "adam_mini": ({"method": "adam_mini"}, 300, 1150),
    "foam": ({"method": "foam"}, 250, 1150),
    "racs": ({"method": "racs"}, 560, 2400),
    "rmnp": ({"method": "rmnp"}, 200, 950),
    "scale": ({"method": "scale"}, 230, 1000),
    "stable_spam": ({"method": "stable_spam"}, 540, 1900),
}
"""Settings, and the most launches of gradient norm and step at 60M and 1B."""


def counted(model: str, settings: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Launches by phase, and waits, of an ordinary update."""
    from peft_pretraining.methods import METHODS
    from peft_pretraining.report.footprint.drive import Simulation

    shape = json.loads((CONFIGS / f"llama_{model}.json").read_text())
    own = {"precision": "bf16", **settings}
    if "update_proj_gap" in METHODS[settings["method"]].own:
        own["update_proj_gap"] = 1000
    with Simulation(config_of(**own), shape) as simulation:
        for step in range(2):
            simulation.update(step)
        counts = simulation.update(2).counts
    return counts.launches(), sum(counts.host_waits().values())


def beside_the_passes(model: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Launches of gradient norm and step, and waits."""
    launches, waits = counted(model, settings)
    own = launches["norm"] + launches["step"]
    if settings.get("per_layer"):  # which takes place inside the backward pass
        plain, _ = counted(model, {**settings, "per_layer": False})
        own += launches["backward"] - plain["backward"]
    return own, waits


def main() -> None:
    print("| | 60M | waits | 1B | waits |")
    print("|---|--:|--:|--:|--:|")
    for name, (settings, *_) in LIMITS.items():
        cells = [str(number) for model in ("60m", "1b") for number in beside_the_passes(model, settings)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
