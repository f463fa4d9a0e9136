"""AdamW for low-rank factors: torch's, with its state at hand from the start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import AdamW


def adamw_with_state(groups: Iterable[dict[str, Any]], **settings: Any) -> AdamW:
    """torch's fused AdamW with zero moments: a checkpoint needs tensors to load into, which torch makes only later."""
    optimizer = AdamW(groups, fused=True, **settings)
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
    return optimizer
