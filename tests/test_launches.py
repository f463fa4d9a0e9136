"""How much an update asks of a GPU beside its forward and backward pass: a few launches for all layers, and no wait.

Counted as operators, in a simulation on the meta device; kernels are up to a sixth fewer.
"""

import json
from pathlib import Path

import pytest
from footprint import config_of

from peft_pretraining.report.footprint.drive import Simulation

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OSD = {"method": "online_subspace_descent", "proj_type": "continuous"}
LIMITS = {
    "full_rank": ({"method": "full_rank"}, 40),
    "full_rank adafactor": ({"method": "full_rank", "optimizer": "adafactor"}, 200),
    "full_rank lion": ({"method": "full_rank", "optimizer": "lion"}, 200),
    "full_rank bf16_sr": ({"method": "full_rank", "precision": "bf16_sr"}, 600),
    "galore": ({"method": "galore"}, 150),
    "golore": ({"method": "golore"}, 150),
    "galore per layer": ({"method": "galore", "per_layer": True}, 400),
    "osd": (OSD, 300),
    "lora": ({"method": "lora"}, 60),
    "switchlora": ({"method": "switchlora", "lora_alpha": 1.0, "init_lora_type": "switchlora"}, 300),
    "golore_adapter": ({"method": "golore_adapter"}, 200),
}
"""Settings, and the most launches of gradient norm and step at 60M; at 1B three times as many may be."""


def counted(model, settings):
    """Launches by phase, and waits, of an ordinary update."""
    shape = json.loads((CONFIGS / f"llama_{model}.json").read_text())
    own = {"precision": "bf16", **settings}
    if settings["method"] not in ("full_rank", "lora", "switchlora"):
        own["update_proj_gap"] = 1000
    with Simulation(config_of(**own), shape) as simulation:
        for step in range(2):
            simulation.update(step)
        counts = simulation.update(2).counts
    return counts.launches(), sum(counts.host_waits().values())


def beside_the_passes(model, settings):
    launches, waits = counted(model, settings)
    own = launches["norm"] + launches["step"]
    if settings.get("per_layer"):  # which takes place inside the backward pass
        plain, _ = counted(model, {**settings, "per_layer": False})
        own += launches["backward"] - plain["backward"]
    return own, waits


@pytest.mark.slow
@pytest.mark.parametrize("model", ["60m", "1b"])
@pytest.mark.parametrize("name", LIMITS)
def test_an_update_is_a_few_launches_and_no_wait(name, model):
    settings, limit = LIMITS[name]
    launches, waits = beside_the_passes(model, settings)
    assert launches <= limit * (1 if model == "60m" else 3)
    assert waits == (1 if name == "switchlora" else 0)  # an update that switches may wait
