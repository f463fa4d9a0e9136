from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import boolean, fraction_below_one, fraction_up_to_one, setting
from peft_pretraining.methods._low_rank.settings import LowRankSettings
from peft_pretraining.methods._matrices import settings as matrices
from peft_pretraining.methods._projection import settings as projection


@dataclass(frozen=True)
class LDAdamSettings(LowRankSettings, projection.PerLayerSettings):
    ldadam_rho: float = setting(
        0.908, fraction_up_to_one, "LDAdam: weight of the momentum in what the next subspace is made of"
    )
    ldadam_beta1: float = setting(0.908, fraction_below_one, "LDAdam: decay of the first moment")
    ldadam_beta2: float = setting(0.99, fraction_below_one, "LDAdam: decay of the second moment")
    error_feedback: bool = setting(
        True, boolean, "LDAdam: add to the next gradient what projections have lost, at a state as large as the matrix"
    )


SPEC = replace(
    matrices.FAMILY,
    name="ldadam",
    title="LDAdam",
    paper="2410.16103",
    year=2024,
    summary="Adam in a subspace that moves in every update, with error feedback",
    settings=LDAdamSettings,
    state="mr + 2nr + mn",
    library="LDAdam",
    tiny={"rank": 4},
)
