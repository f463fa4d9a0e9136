from dataclasses import dataclass

from peft_pretraining.flags import Allows, MethodSpec, positive_int, setting
from peft_pretraining.methods._low_rank.settings import LowRankSettings


@dataclass(frozen=True)
class SoapSettings(LowRankSettings):
    soap_gap: int = setting(10, positive_int, "SOAP: updates between two turns of its bases")


SPEC = MethodSpec(
    name="soap_trial",
    title="SOAP",
    paper="2409.11321",
    year=2024,
    summary="Adam in the eigenbasis of Shampoo's Gram matrices",
    settings=SoapSettings,
    state="2mn + 2mm + 2nn",
    allows=Allows(fsdp=True, fine_tuning=True),
    tiny={"rank": 4, "soap_gap": 2},
)
