"""How many collectives an update takes beside FSDP2's own, by method: a few, however many layers there are.

On devices that do not exist (report/footprint), which count what real ones would be asked for.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from footprint import SHAPE, config_of

from peft_pretraining.methods import METHODS
from peft_pretraining.report.footprint.drive import Simulation

STEP = {
    **{name: {} for name in ("full_rank", "galore", "golore", "lora", "frugal", "foam", "rmnp")},
    # Head's and embedding's rows are local to who has them; of the embedding the norms of d columns are added up.
    "scale": {"all_reduce": 1},
    **{name: {"all_reduce": 1} for name in ("apollo", "apollo_mini", "fira")},  # ‖S‖², or [‖N‖², ‖R‖², ‖G‖²]
    "racs": {"all_reduce": 7},  # max|G|, five of n + 1 numbers for each matrix, ‖S‖²
    "alice": {"all_reduce": 2},
    "stable_spam": {"all_reduce": 2},  # a maximum and a sum
    "ldadam": {"all_reduce": 1},
    "adam_mini": {"all_reduce": 1},  # means over norms, and over heads that are cut
    "muon": {"all_reduce": 1, "all_to_all": 2},  # ‖U‖² where U travels in 16 bits; to the owners and back
    "normuon": {"all_reduce": 2, "all_to_all": 2},
    "soap": {"all_to_all": 2},
}
"""Collectives of the step of an ordinary update, as the papers' formulas ask for them."""
SETTINGS: dict[str, dict[str, Any]] = {
    "relora": {"relora": 200},
    "switchlora": {"lora_alpha": 1.0, "init_lora_type": "switchlora"},
}
METHODS_WITH_FSDP = [name for name, spec in METHODS.items() if spec.allows.fsdp]


def counted(method: str, layers: int, **settings: Any) -> list[Counter[tuple[str, str]]]:
    """Collectives of the first update and of an ordinary one, by phase and kind, without forward and backward pass."""
    own = {"method": method, "distributed_type": "fsdp", "precision": "bf16", **SETTINGS.get(method, {}), **settings}
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "vocab_size": 256}
    found = []
    with Simulation(config_of(**own), shape, devices=2) as simulation:
        for step in range(2):
            kinds: Counter[tuple[str, str]] = Counter()
            for exchange, number in simulation.update(step).counts.exchanges.items():
                if exchange.phase in ("before", "norm", "step"):
                    kinds[exchange.phase, exchange.kind] += number
            found.append(kinds)
    return found


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name != "muon")) for name in METHODS_WITH_FSDP]
)
def test_the_number_of_collectives_does_not_depend_on_that_of_layers(method):
    few, many = counted(method, 2), counted(method, 4)
    assert few == many
    if method in STEP:
        assert {kind: number for (phase, kind), number in many[1].items() if phase == "step"} == STEP[method]
