"""LoRA: the linear layers keep their first weights and train low-rank factors beside them.

Hu et al., arXiv 2106.09685. As a pre-training method it is the baseline that the others are measured against.
"""

from __future__ import annotations

from peft_pretraining.methods.factors import FactorMethod


class LoRA(FactorMethod):
    """All of it is in the shared base: factors that stay where they are."""

    corrects_weights = False
