from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import fraction_below_one, setting
from peft_pretraining.methods.muon import settings as muon


@dataclass(frozen=True)
class NorMuonSettings(muon.MuonSettings):
    neuron_beta2: float = setting(
        0.95, fraction_below_one, "NorMuon: decay of the mean squares by which rows are evened out", identity=True
    )


SPEC = replace(
    muon.SPEC,
    name="normuon",
    title="NorMuon",
    paper="2510.05491",
    year=2025,
    summary="Muon whose rows are evened out by their mean squares over time",
    settings=NorMuonSettings,
    state="mn + outputs",
    library="NorMuon",
)
