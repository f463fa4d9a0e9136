from __future__ import annotations

from dataclasses import dataclass, replace

from peft_pretraining.flags import boolean, choice, setting
from peft_pretraining.methods._matrices import settings as matrices

SCALES = ("match_rms", "spectral")
NS_DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class MuonSettings(matrices.NesterovSettings):
    muon_scale: str = setting(
        "match_rms",
        choice(*SCALES),
        "Muon: size of a step. match_rms: AdamW's, 0.2 in root mean square, so that one --lr serves all; spectral: "
        "√max(1, rows / columns), the original one, with rates of its own",
    )
    muon_ns_dtype: str = setting(
        "auto",
        choice(*NS_DTYPES),
        "Muon: what the Newton-Schulz iterations are computed in; auto: bfloat16 on CUDA, else float32",
    )
    muon_shard_compute: bool = setting(
        False,
        boolean,
        "Muon: with DDP, each process iterates for its share of the matrices and hands them on, 2 bytes per number "
        "where the iteration is in bfloat16, else those of the weight; FSDP2 divides the work in any case",
    )


SPEC = replace(
    matrices.FAMILY,
    name="muon",
    title="Muon",
    paper="2502.16982",
    year=2024,
    summary="momentum whose singular values are all made (nearly) 1",
    settings=MuonSettings,
    defaults={**matrices.FAMILY.defaults, "adam_beta2": 0.95},
    state="mn",
    library="Muon",
)
