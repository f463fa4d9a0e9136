"""What rounding costs: the same run with every precision, against float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..lines import Lines
from ..scene import Scene
from ..trainee import Trainee, settings_of

NAMES = ("fp32", "mixed", "bf16_sr", "bf16")
NATS, MOVED, MOMENTS = 0.005, 0.95, 0.05
"""Above float32's loss; share of the norm weights that are not 1.0 any more; how far the mean root of the second
moments may be from float32's."""


@dataclass(frozen=True)
class Result:
    loss: float
    moved: float
    root: float


def compared(scene: Scene, lines: Lines, case: str) -> None:
    results = {name: _train(scene, name) for name in NAMES}
    reference = results["fp32"]
    lines.reports("9m, fp32: validation loss", reference.loss, "nats")
    for name in NAMES[1:]:
        result = results[name]
        above, root = result.loss - reference.loss, abs(result.root / reference.root - 1)
        if name == "bf16" or scene.quick:  # as published: reported, for it is not expected to hold
            lines.reports(f"9m, {name}: validation loss above fp32's", above, "nats")
            lines.reports(f"9m, {name}: norm weights that moved", result.moved)
            continue
        lines.at_most(f"9m, {name}: validation loss above fp32's", above, NATS, "nats")
        lines.at_least(f"9m, {name}: norm weights that moved", result.moved, MOVED)
        lines.at_most(f"9m, {name}: mean root of the second moments, off fp32's", root, MOMENTS)


def _train(scene: Scene, name: str) -> Result:
    updates = scene.size(600, 3)
    settings = settings_of(scene, "9m", name, method="full_rank", precision=name)
    settings |= {
        "batch_size": scene.size(32, 4),
        "num_training_steps": updates,
        "scheduler": "cosine",
        "min_lr_ratio": 0.1,
    }
    settings |= {"warmup_steps": updates // 20, "lr": 2e-3}
    with Trainee(settings, scene.device) as trainee:
        for _ in range(updates):
            trainee.update()
        run = trainee.run
        weights = [param for key, param in run.model.named_parameters() if "norm" in key]
        moved = sum(float((weight != 1).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        return Result(_validation_loss(run), moved, _mean_root(run.optimizer))


def _validation_loss(run: Any) -> float:
    from peft_pretraining.training.evaluate import evaluate

    result = evaluate(run.model, run.data.evaluation_sets[0].batches, run.group, lambda: False)
    assert result is not None, "nobody asked to stop"
    return result.loss


def _mean_root(optimizer: torch.optim.Optimizer) -> float:
    """Over all second moments in full; NaN where none are kept so."""
    moments = [
        value.detach().double().sqrt()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key.endswith("exp_avg_sq") and torch.is_floating_point(value)
    ]
    count = sum(each.numel() for each in moments)
    return sum(float(each.sum()) for each in moments) / count if count else math.nan
