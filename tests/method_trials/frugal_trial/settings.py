from dataclasses import dataclass

from peft_pretraining.flags import Allows, MethodSpec, positive_int, setting
from peft_pretraining.methods._low_rank.settings import LowRankSettings


@dataclass(frozen=True)
class FrugalSettings(LowRankSettings):
    frugal_gap: int = setting(200, positive_int, "FRUGAL: updates for which the chosen matrices stay")


SPEC = MethodSpec(
    name="frugal_trial",
    title="FRUGAL",
    paper="2411.07837",
    year=2024,
    summary="Adam on some of the matrices, sign descent on the others",
    settings=FrugalSettings,
    state="",
    allows=Allows(fsdp=True, fine_tuning=True),
    tiny={"rank": 4, "frugal_gap": 2},
)
