from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import MethodSpec
from peft_pretraining.methods._projection import settings as projection


@dataclass(frozen=True)
class GaLoreSettings(projection.ProjectionSettings):
    pass


SPEC = MethodSpec(
    name="galore",
    title="GaLore",
    paper="2403.03507",
    year=2024,
    summary="AdamW on gradients projected on their top singular vectors",
    family=projection.FAMILY,
    settings=GaLoreSettings,
    defaults=projection.DEFAULTS,
    values={"proj_type": projection.PROJECTION_TYPES},
    update_rules=projection.UPDATE_RULES,
    state="mr + 2nr",
    allows=projection.ALLOWS,
    tiny=projection.TINY,
    conditions=projection.CONDITIONS,
    resolve=projection.resolve,
    check=projection.check,
    check_fine_tuning=projection.check_fine_tuning,
)
