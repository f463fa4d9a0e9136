"""Linear layers whose weight is frozen and whose updates live in two low-rank factors.

Imports of the package: `distributed`, `models`, `optim`.
"""

from peft_pretraining.nn.low_rank_linear import LowRankLinear
from peft_pretraining.nn.wrapping import low_rank_layers, merged_state_dict, replace_linear, wrap_linears

__all__ = ["LowRankLinear", "low_rank_layers", "merged_state_dict", "replace_linear", "wrap_linears"]
