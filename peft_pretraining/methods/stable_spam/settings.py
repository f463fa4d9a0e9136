from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_pretraining.flags import (
    Allows,
    MethodSpec,
    ParsedFlag,
    fraction_below_one,
    fraction_up_to_one,
    non_negative_int,
    setting,
)
from peft_pretraining.methods._projection import settings as projection

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@dataclass(frozen=True)
class StableSpamSettings(projection.GapSettings):
    stable_spam_gamma1: float = setting(
        0.7, fraction_below_one, "Stable-SPAM: decay of the running mean of gradient norms"
    )
    stable_spam_gamma2: float = setting(
        0.9, fraction_below_one, "Stable-SPAM: decay of the running mean of their squares"
    )
    stable_spam_theta: float = setting(
        0.999, fraction_below_one, "Stable-SPAM: decay of the running mean of largest entries, at which spikes are cut"
    )
    stable_spam_total: int | None = setting(
        None,
        non_negative_int,
        "Stable-SPAM: updates over which --adam_beta1 and --stable_spam_gamma1 fall; 0: never (default: the run's)",
    )
    stable_spam_floor: float = setting(
        0.5, fraction_up_to_one, "Stable-SPAM: what these are multiplied by at the end of that time"
    )


def _check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    projection.check_whole_gradient(config, given, problems)


SPEC = MethodSpec(
    name="stable_spam",
    title="Stable-SPAM",
    paper="2502.17055",
    year=2025,
    summary="AdamW on gradients whose spikes are cut and whose norm is a running one, with moments that begin anew",
    family="whole gradients, all weights alike",
    settings=StableSpamSettings,
    defaults={"update_proj_gap": 1000, "state_dtype": "float32"},
    meanings={"update_proj_gap": "updates after which the moments begin anew (ΔT); 0: never"},
    state="2mn + 3",
    allows=Allows(fsdp=True, fine_tuning=True, stochastic_rounding=True, tables=True, fp16=True),
    tables=frozenset({"head", "embedding"}),
    library="StableSPAM",
    tiny={"update_proj_gap": 2},
    check=_check,
)
