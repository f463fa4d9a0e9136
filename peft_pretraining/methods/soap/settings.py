from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import fraction_below_one, non_negative_int, setting
from peft_pretraining.methods._matrices import settings as matrices
from peft_pretraining.methods._projection import settings as projection


@dataclass(frozen=True)
class SoapSettings(matrices.MomentumSettings, projection.GapSettings):
    soap_beta2: float = setting(
        0.95, fraction_below_one, "SOAP: decay of the second moments and of both Gram matrices", identity=True
    )
    soap_max_side: int = setting(
        10_000, non_negative_int, "SOAP: longer sides of a matrix are left as they are, without a basis", identity=True
    )


SPEC = replace(
    matrices.FAMILY,
    name="soap",
    title="SOAP",
    paper="2409.11321",
    year=2024,
    summary="Adam in the eigenbasis of Shampoo's two Gram matrices",
    settings=SoapSettings,
    defaults={**matrices.FAMILY.defaults, "update_proj_gap": 10},
    meanings={"update_proj_gap": "updates from one step of the bases towards eigenvectors to the next; 0: never"},
    state="2mn + 2mm + 2nn",
    library="SOAP",
    tiny={"update_proj_gap": 2},
    period="update_proj_gap",
)
