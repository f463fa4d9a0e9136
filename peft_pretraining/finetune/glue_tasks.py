"""The nine GLUE tasks: columns, labels in their official order, and metrics.

Wang et al., arXiv 1804.07461, table 1. Columns and the order of labels are those of `nyu-mll/glue` on the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Metrics = dict[str, float]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    return {"accuracy": float((predictions == labels).mean())}


def accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    """F1 is that of class 1: equivalent, or duplicate."""
    from sklearn.metrics import f1_score

    found = accuracy(predictions, labels)
    return {**found, "f1": float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0.0))}


def matthews(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(labels, predictions))}


def pearson_and_spearman(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    """0 where a correlation is undefined, that is where all predictions are equal."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearmanr": 0.0}
    return {
        "pearson": float(pearsonr(predictions, labels).statistic),
        "spearmanr": float(spearmanr(predictions, labels).statistic),
    }


def squared_error(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    return {"mse": float(((predictions - labels) ** 2).mean())}


@dataclass(frozen=True)
class GlueTask:
    """One task, from the benchmark or from files."""

    columns: tuple[str, ...]
    """One or two columns of text."""
    labels: tuple[str, ...]
    """Names by class number; none for regression."""
    metric: Callable[[np.ndarray, np.ndarray], Metrics]
    """Predictions (N,) and labels (N,), class numbers or scores -> numbers by name."""
    main_metric: str
    """What chooses the best model."""
    validation: tuple[str, ...] = ("validation",)
    """Splits to evaluate on; the numbers of a second one get the ending `_mm`."""
    test: tuple[str, ...] = ("test",)

    @property
    def is_regression(self) -> bool:
        return not self.labels


_PAIR = ("sentence1", "sentence2")

GLUE_TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), matthews, "matthews_correlation"),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        accuracy,
        "accuracy",
        ("validation_matched", "validation_mismatched"),
        ("test_matched", "test_mismatched"),
    ),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), accuracy_and_f1, "accuracy"),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment"), accuracy, "accuracy"),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), accuracy_and_f1, "accuracy"),
    "rte": GlueTask(_PAIR, ("entailment", "not_entailment"), accuracy, "accuracy"),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), accuracy, "accuracy"),
    "stsb": GlueTask(_PAIR, (), pearson_and_spearman, "pearson"),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment"), accuracy, "accuracy"),
}


def compute_metrics(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> Metrics:
    """The task's numbers from logits (N, classes) or scores (N, 1), and their mean where there are several."""
    predictions = predicted(task, logits)
    found = task.metric(predictions, labels.astype(predictions.dtype))
    return {**found, "combined_score": float(np.mean(list(found.values())))} if len(found) > 1 else found


def predicted(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Class numbers, or scores, (N,)."""
    return logits.reshape(-1).astype(np.float64) if task.is_regression else logits.argmax(-1)
