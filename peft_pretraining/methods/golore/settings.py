from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import ParsedFlag
from peft_pretraining.methods._projection import settings as projection

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@dataclass(frozen=True)
class GoLoreSettings(projection.ProjectionSettings, projection.RandomBasisSettings):
    pass


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    projection.check(config, given, problems, warnings)
    projection.check_random(config, warnings)


SPEC = replace(
    projection.FAMILY,
    name="golore",
    title="GoLore",
    paper="2410.11289",
    year=2024,
    summary="GaLore, with random projections from `--rand_ratio` of the run on",
    settings=GoLoreSettings,
    tiny={**projection.FAMILY.tiny, "rand_ratio": 0.5},
    conditions=(*projection.FAMILY.conditions, *projection.RANDOM_CONDITIONS),
    check=check,
)
