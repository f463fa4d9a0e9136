from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_pretraining.flags import MethodSpec, ParsedFlag
from peft_pretraining.methods._projection import settings as projection

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@dataclass(frozen=True)
class GoLoreSettings(projection.ProjectionSettings, projection.RandomBasisSettings):
    pass


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    projection.check(config, given, problems, warnings)
    projection.check_random(config, warnings)


SPEC = MethodSpec(
    name="golore",
    title="GoLore",
    paper="2410.11289",
    year=2024,
    summary="GaLore, with random projections from `--rand_ratio` of the run on",
    family=projection.FAMILY,
    settings=GoLoreSettings,
    defaults=projection.DEFAULTS,
    values={"proj_type": projection.PROJECTION_TYPES},
    update_rules=projection.UPDATE_RULES,
    state="mr + 2nr",
    allows=projection.ALLOWS,
    tiny={**projection.TINY, "rand_ratio": 0.5},
    conditions=(*projection.CONDITIONS, *projection.RANDOM_CONDITIONS),
    resolve=projection.resolve,
    check=check,
    check_fine_tuning=projection.check_fine_tuning,
)
