from __future__ import annotations

from dataclasses import replace

from peft_pretraining.methods.apollo.settings import SPEC as APOLLO

SPEC = replace(
    APOLLO,
    name="apollo_mini",
    title="APOLLO-Mini",
    summary="APOLLO with one factor for the whole matrix, from a projection on one dimension",
    defaults={**APOLLO.defaults, "rank": 1, "scale": 128.0},
    library="ApolloMini",
    tiny={**APOLLO.tiny, "rank": 1},
)
