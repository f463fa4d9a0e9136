from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.methods._matrices import settings as matrices


@dataclass(frozen=True)
class RmnpSettings(matrices.NesterovSettings):
    pass


SPEC = replace(
    matrices.FAMILY,
    name="rmnp",
    title="RMNP",
    paper="2603.20527",
    year=2026,
    summary="momentum whose rows are all made of length 1",
    settings=RmnpSettings,
    defaults={**matrices.FAMILY.defaults, "adam_beta2": 0.95, "adam_eps": 1e-10},
    state="mn",
    library="RMNP",
)
