from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import Condition, ParsedFlag, choice, non_negative_float, positive_float, setting
from peft_pretraining.methods._matrices import settings as matrices
from peft_pretraining.methods._projection import settings as projection

if TYPE_CHECKING:
    from peft_pretraining.config import Config

SPACES = ("blocks", "columns", "rows", "svd")
FREE_RULES = ("sign", "sgd", "none")
ORDERS = ("random", "descending")


@dataclass(frozen=True)
class FrugalSettings(projection.PerLayerSettings, projection.GapSettings):
    frugal_space: str = setting(
        "blocks",
        choice(*SPACES),
        "FRUGAL: what Adam is for: blocks (whole matrices), columns, rows, svd (the gradient's top singular vectors)",
        identity=True,
    )
    frugal_density: float = setting(
        0.25,
        positive_float,
        "FRUGAL: share of the matrices, columns, rows or dimensions that Adam is for",
        identity=True,
    )
    frugal_blocks: str = setting(
        "random",
        choice(*ORDERS),
        "FRUGAL: which matrices come next: random, or descending (consecutive ones, from the last to the first)",
    )
    frugal_free_rule: str = setting(
        "sign", choice(*FREE_RULES), "FRUGAL: how everything else moves: sign, sgd (by its gradient) or none"
    )
    frugal_free_scale: float = setting(1.0, non_negative_float, "FRUGAL: factor of everything else's steps")


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    projection.check_whole(config, given, problems, warnings)
    if config.method.frugal_density > 1:
        problems.append(f"--frugal_density {config.method.frugal_density:g}: must be at most 1")


SPEC = replace(
    matrices.FAMILY,
    name="frugal",
    title="FRUGAL",
    paper="2411.07837",
    year=2024,
    summary="Adam on a changing part of the coordinates, sign descent on the rest",
    settings=FrugalSettings,
    meanings={"update_proj_gap": "updates for which Adam's part stays; 0 keeps the first"},
    period="update_proj_gap",
    state="2dmn",
    state_letters={"d": ("`--frugal_density`", lambda settings: settings.frugal_density)},
    library="Frugal",
    tiny={"update_proj_gap": 2, "frugal_space": "columns", "frugal_free_scale": 0.3},
    conditions=(
        Condition(
            ("frugal_blocks",), lambda c: c.method.frugal_space == "blocks", "with --frugal_space {frugal_space}"
        ),
        Condition(
            ("frugal_free_scale",), lambda c: c.method.frugal_free_rule != "none", "with --frugal_free_rule none"
        ),
    ),
    check=check,
)
