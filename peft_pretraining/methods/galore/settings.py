from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.methods._projection import settings as projection


@dataclass(frozen=True)
class GaLoreSettings(projection.ProjectionSettings):
    pass


SPEC = replace(
    projection.FAMILY,
    name="galore",
    title="GaLore",
    paper="2403.03507",
    year=2024,
    summary="AdamW on gradients projected on their top singular vectors",
    settings=GaLoreSettings,
)
