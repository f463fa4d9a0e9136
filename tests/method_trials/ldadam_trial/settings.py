from dataclasses import dataclass

from peft_pretraining.flags import Allows, MethodSpec
from peft_pretraining.methods._low_rank.settings import LowRankSettings


@dataclass(frozen=True)
class LDAdamSettings(LowRankSettings):
    pass


SPEC = MethodSpec(
    name="ldadam_trial",
    title="LDAdam",
    paper="2410.16103",
    year=2024,
    summary="Adam in a subspace that moves in every update, with error feedback",
    settings=LDAdamSettings,
    state="mr + 2nr + mn",
    allows=Allows(fsdp=True, fine_tuning=True),
    tiny={"rank": 4},
)
