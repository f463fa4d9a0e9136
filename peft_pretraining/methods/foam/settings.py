from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import choice, non_negative_int, setting
from peft_pretraining.methods._matrices import settings as matrices
from peft_pretraining.methods._projection import settings as projection

SECOND_MOMENTS = ("mean_of_squares", "square_of_mean")


@dataclass(frozen=True)
class FoamSettings(projection.PerLayerSettings, projection.ScaleSettings):
    foam_level: int = setting(
        2, non_negative_int, "FOAM: moments are kept for blocks of 2 to the power of this many inputs", identity=True
    )
    foam_second: str = setting(
        "mean_of_squares",
        choice(*SECOND_MOMENTS),
        "FOAM: what the second moment follows: the mean of a block's squares (as the authors' code) or the square of "
        "its mean (as the paper first had it)",
    )


SPEC = replace(
    matrices.FAMILY,
    name="foam",
    title="FOAM",
    paper="2512.07112",
    year=2025,
    summary="AdamW with moments of blocks of inputs, and what the blocks lose from the gradient itself",
    settings=FoamSettings,
    defaults={**matrices.FAMILY.defaults, "scale": 0.25},
    meanings={"scale": "factor of the matrices' steps"},
    state="2mn/b",
    state_letters={"b": ("2^`--foam_level`", lambda settings: 2**settings.foam_level)},
    library="Foam",
)
