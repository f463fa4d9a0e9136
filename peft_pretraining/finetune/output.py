"""The files that results go to, and what is printed of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.plain_files import regular
from peft_pretraining.finetune.entry import RunFailed
from peft_pretraining.flags import ConfigError

RESULTS_FILE = "all_results.json"
SPEED = ("_runtime", "_per_second")
"""Endings of numbers that are another time others."""

Results = dict[str, Any]


def check_metric(name: str, found: Iterable[str]) -> None:
    """Raise `ConfigError` where `--metric_for_best_model` is not among what an evaluation finds."""
    known = ["loss", *found]
    if name.removeprefix("eval_") not in known:
        raise ConfigError([f"--metric_for_best_model {name}: an evaluation finds {', '.join(known)}"])


def check_losses(metrics: Results) -> None:
    """Raise `RunFailed` where a loss is not finite: numbers of such a model are not to be reported."""
    for name, value in metrics.items():
        if "loss" in name and isinstance(value, float) and not math.isfinite(value):
            raise RunFailed(f"{name} is {value}: the model's outputs are not finite, and nothing is reported")


def finite_only(values: Results) -> Results:
    """With null for numbers that are not finite: JSON has none."""
    return _clean(values)


def print_results(results: Results) -> None:
    """The numbers of evaluation and test, one line each."""
    for name, value in results.items():
        if name.startswith(("eval_", "test_")) and isinstance(value, int | float) and not name.endswith(SPEED):
            print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")


def write_json(path: Path, values: Results) -> None:
    """Not-a-number becomes null: JSON has no such number."""
    run_dir.write_atomically(path, json.dumps(_clean(values), indent=2) + "\n")


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: Path) -> Results | None:
    """None for a file that is no JSON object, as one that was cut off."""
    try:
        found = json.loads(regular(path).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
