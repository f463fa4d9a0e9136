from __future__ import annotations

from peft_pretraining.flags import Allows, MethodSettings, MethodSpec

SPEC = MethodSpec(
    name="full_rank",
    title="Full-rank",
    summary="AdamW",
    settings=MethodSettings,
    update_rules=("adamw", "adamw8bit", "adafactor", "lion", "sgd", "adam_zero"),
    state="2mn",
    allows=Allows(fsdp=True, fine_tuning=True, stochastic_rounding=True, tables=True, fp16=True),
    tables=frozenset({"head", "embedding"}),
)
