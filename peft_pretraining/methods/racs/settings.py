from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import fraction_below_one, positive_int, setting
from peft_pretraining.methods._matrices import settings as matrices
from peft_pretraining.methods._projection import settings as projection


@dataclass(frozen=True)
class RacsSettings(projection.PerLayerSettings, projection.ScaleSettings, projection.LimiterSettings):
    racs_beta: float = setting(0.9, fraction_below_one, "RACS: decay of the row and column scales")
    racs_iterations: int = setting(5, positive_int, "RACS: fixed-point iterations for the scales of a gradient")


SPEC = replace(
    matrices.FAMILY,
    name="racs",
    title="RACS",
    paper="2502.07752",
    year=2025,
    summary="SGD whose gradients are scaled by rows and by columns",
    settings=RacsSettings,
    defaults={**matrices.FAMILY.defaults, "scale": 0.05},
    meanings={"scale": "factor of the matrices' steps"},
    state="m + n + 1",
    library="Racs",
    tiny={"scale": 0.25},
)
