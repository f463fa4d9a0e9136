"""Metrics of the option tasks, over predicted and right labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def compute(names: Sequence[str], predicted: np.ndarray, right: np.ndarray, labels: int) -> dict[str, float]:
    """`accuracy`, and `f1`: of label 1 where there are two labels (MultiRC's F1a), else the mean over labels (CB)."""
    values = {}
    for name in names:
        if name == "accuracy":
            values[name] = float((predicted == right).mean())
        else:
            from sklearn.metrics import f1_score

            # Labels that neither occur nor are predicted have no F1.
            average = "binary" if labels == 2 else "macro"
            values[name] = float(f1_score(right, predicted, average=average, zero_division=0.0))
    return values
