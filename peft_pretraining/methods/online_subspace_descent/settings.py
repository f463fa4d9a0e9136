from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import Condition, ParsedFlag
from peft_pretraining.methods._projection import settings as projection

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@dataclass(frozen=True)
class SubspaceDescentSettings(projection.ProjectionSettings):
    pass


def _learns(config: Config) -> bool:
    """Whether a step of the basis follows every gradient."""
    return config.method.proj_type in projection.ONLINE_TYPES


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    projection.check(config, given, problems, warnings)
    method = config.method
    if _learns(config) and method.update_proj_gap == 0:
        problems.append(
            f"--update_proj_gap 0: must be positive with --proj_type {method.proj_type}, whose basis learns at 1 / gap"
        )


_CONDITIONS = (
    Condition(("stagger_refresh",), lambda c: not _learns(c), "for --proj_type {proj_type}"),
    Condition(
        ("reduce_low_rank",), lambda c: not _learns(c), "for --proj_type {proj_type}, which needs whole gradients"
    ),
)

SPEC = replace(
    projection.FAMILY,
    name="online_subspace_descent",
    title="Online Subspace Descent",
    paper="2408.12857",
    year=2024,
    summary="the projection is learnt by online PCA, without SVDs",
    settings=SubspaceDescentSettings,
    defaults={**projection.FAMILY.defaults, "proj_type": "continuous"},
    values={"proj_type": projection.SUBSPACE_DESCENT_TYPES},
    state="3mr + 2nr",
    conditions=(*_CONDITIONS, *projection.FAMILY.conditions),
    check=check,
)
