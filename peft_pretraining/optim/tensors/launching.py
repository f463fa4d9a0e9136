"""Where what is alike is computed together: on devices a launch costs more than a small matrix does."""

from __future__ import annotations

import torch

ON_EVERY_DEVICE = False
"""For tests: on the CPU, too."""


def launches_cost(device: torch.device) -> bool:
    """Whether it is worth a copy to make one launch of many. On the CPU it is not: matrices stay in the cache."""
    return ON_EVERY_DEVICE or device.type != "cpu"
