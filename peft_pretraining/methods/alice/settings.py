from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import ParsedFlag, fraction_below_one, non_negative_float, non_negative_int, setting
from peft_pretraining.methods._low_rank.settings import LowRankSettings
from peft_pretraining.methods._matrices import settings as matrices
from peft_pretraining.methods._projection import settings as projection

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@dataclass(frozen=True)
class AliceSettings(
    LowRankSettings, projection.PerLayerSettings, projection.RefreshSettings, projection.LimiterSettings
):
    alice_leading: int = setting(
        40, non_negative_int, "Alice: leading vectors that a refresh keeps; the others are drawn from the complement"
    )
    alice_compensation: float = setting(
        0.4, non_negative_float, "Alice: factor of what is outside the subspace, beside --scale"
    )
    alice_beta1: float = setting(
        0.9, fraction_below_one, "Alice: decay of the first moment, and of the energy outside the subspace"
    )
    alice_beta2: float = setting(0.9, fraction_below_one, "Alice: decay of the second moment")
    alice_beta3: float = setting(
        0.999,
        fraction_below_one,
        "Alice: decay of the tracked Gram matrix, and its weight in a refresh; 0 is Alice-0, which tracks none",
    )


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    projection.check_whole(config, given, problems, warnings)
    method = config.method
    if method.alice_leading >= method.rank:
        warnings.append(
            f"--alice_leading {method.alice_leading} is not below --rank {method.rank}: refreshes draw no vectors"
        )


SPEC = replace(
    matrices.FAMILY,
    name="alice",
    title="Alice",
    paper="2502.07752",
    year=2025,
    summary="Adam in a tracked subspace with drawn vectors, and what is outside, scaled by column",
    settings=AliceSettings,
    defaults={**matrices.FAMILY.defaults, "scale": 0.3},
    meanings={
        "scale": "factor of the matrices' steps, inside and outside the subspace",
        "update_proj_gap": "updates between two refreshes of the subspace; 0 keeps the first",
    },
    tables=frozenset({"head"}),
    period="update_proj_gap",
    state="mr + 2nr + n + 1 + rr",
    library="Alice",
    allows=replace(matrices.FAMILY.allows, stored_bases=True),
    tiny={"rank": 4, "update_proj_gap": 2, "alice_leading": 2},
    check=check,
)
