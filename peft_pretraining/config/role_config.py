"""What embedding, head and norms are updated by, a section of `Config`: rules, rates and decays of their own.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import choice, non_negative_float, positive_float, setting

TABLE_OPTIMIZERS = ("auto", "adamw", "method")
"""What updates a table: the embedding, or the head."""


@dataclass(frozen=True)
class RoleConfig:
    """Update rules, rates and decays of what is no matrix of a layer; all rates share the schedule's multiplier."""

    head_optimizer: str = setting(
        "auto",
        choice(*TABLE_OPTIMIZERS),
        "what updates the head, a tied one too: adamw, method (as the matrices), auto (what the method's authors do)",
    )
    embed_optimizer: str = setting(
        "auto", choice(*TABLE_OPTIMIZERS), "what updates the embedding: adamw, method, auto, as --head_optimizer"
    )
    adam_lr: float | None = setting(
        None,
        positive_float,
        "peak rate of embedding, head, norms and what else is no matrix of a layer (default: --lr)",
    )
    head_lr: float | None = setting(None, positive_float, "peak rate of the head, tied ones too (default: --adam_lr)")
    embed_lr: float | None = setting(None, positive_float, "peak rate of the embedding (default: --adam_lr)")
    norm_lr: float | None = setting(None, positive_float, "peak rate of norms and biases (default: --adam_lr)")
    head_weight_decay: float | None = setting(
        None, non_negative_float, "decay of the head, tied ones too (default: --weight_decay)"
    )
    embed_weight_decay: float | None = setting(
        None, non_negative_float, "decay of the embedding (default: --weight_decay)"
    )
    norm_weight_decay: float | None = setting(
        None, non_negative_float, "decay of norms and biases (default: --weight_decay)"
    )
