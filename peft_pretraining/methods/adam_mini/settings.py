from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peft_pretraining.flags import Allows, MethodSettings, MethodSpec, ParsedFlag
from peft_pretraining.methods._projection import settings as projection

if TYPE_CHECKING:
    from peft_pretraining.config import Config


def _check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    projection.check_whole_gradient(config, given, problems)


SPEC = MethodSpec(
    name="adam_mini",
    title="Adam-mini",
    paper="2406.16793",
    year=2024,
    summary="AdamW with one second moment for each attention head, output unit or vector",
    family="whole gradients, all weights alike",
    settings=MethodSettings,
    defaults={"state_dtype": "float32"},
    state="mn + blocks",
    allows=Allows(fsdp=True, fine_tuning=True, stochastic_rounding=True, tables=True, fp16=True),
    tables=frozenset({"head", "embedding"}),
    library="AdamMini",
    check=_check,
)
