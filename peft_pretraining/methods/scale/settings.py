from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import choice, setting
from peft_pretraining.methods._matrices import settings as matrices

NORMS = ("rms", "l2")


@dataclass(frozen=True)
class ScaleMethodSettings(matrices.MomentumSettings):
    scale_norm: str = setting(
        "rms",
        choice(*NORMS),
        "SCALE: what each output unit's gradient is divided by: its root mean square (as the authors' code) or its "
        "length (as the paper), with which steps are √length times shorter",
    )


SPEC = replace(
    matrices.FAMILY,
    name="scale",
    title="SCALE",
    paper="2506.16659",
    year=2025,
    summary="SGD whose gradient is normalised for each output unit, with a momentum in the head alone",
    settings=ScaleMethodSettings,
    defaults={**matrices.FAMILY.defaults, "matrix_momentum": 0.9},
    meanings={"matrix_momentum": "share of the head's mean gradient that an update keeps; other matrices have none"},
    state="0",
    tables=frozenset({"head", "embedding"}),
    library="Scale",
)
