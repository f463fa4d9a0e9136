"""Folders of runs for tests of reports: a few real ones, and copies that something has happened to."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import helpers
import yaml


def make_runs(folder: Path, data_dir: Path, model_json: Path) -> Path:
    """Real runs of 6 updates, evaluated at 0, 3 and 6: full rank with two seeds, GaLore at two rates."""
    shared = {
        **{"model_config": model_json, "dataset_path": data_dir, "batch_size": 4, "total_batch_size": 4, "workers": 0},
        **{"num_training_steps": 6, "warmup_steps": 1, "eval_every": 3, "save_every": 6, "eval_tokens": 2000},
    }
    kinds = {
        "full_rank/seed1": {"method": "full_rank", "lr": 1e-2, "seed": 1},
        "full_rank/seed2": {"method": "full_rank", "lr": 1e-2, "seed": 2},
        "galore/lr0.01": {"method": "galore", "rank": 4, "lr": 1e-2, "seed": 1},
        "galore/lr0.02": {"method": "galore", "rank": 4, "lr": 2e-2, "seed": 1},
    }
    for name, own in kinds.items():
        settings = {**shared, **own, "save_dir": folder / name}
        assert helpers.run([part for key, value in settings.items() for part in (f"--{key}", str(value))]) == 0
        for checkpoint in (folder / name).glob("model_*"):
            shutil.rmtree(checkpoint)
    return folder


def copy(run: Path, to: Path, records: Iterable[dict[str, Any]] | bytes | None = None, **settings: Any) -> Path:
    """A run's folder with other settings, and with other metrics where some are given: records, or bytes."""
    to.mkdir(parents=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["settings"].update(settings)
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    if records is None:
        records = (run / "metrics.jsonl").read_bytes()
    if not isinstance(records, bytes):
        records = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    (to / "metrics.jsonl").write_bytes(records)
    return to


def record_of_update(step: int) -> dict[str, Any]:
    """512 tokens in half a second."""
    return {
        **{"update_step": step, "loss": 4 - step / 1000, "lr": 0.01, "grad_norm": 1.0, "tokens_seen": 512 * step},
        **{"throughput_tokens": 1000.0, "step_time": 0.5, "peak_memory_bytes": 2**30},
    }


def record_of_evaluation(step: int, loss: float | None = 4.0) -> dict[str, Any]:
    """With the perplexity that belongs to the loss."""
    perplexity = None if loss is None else math.exp(loss)
    return {
        **{"update_step": step, "tokens_seen": 512 * step, "final_eval_loss": loss},
        **{"final_eval_perplexity": perplexity, "optimizer_state_bytes": 4_000_000},
    }


def write_run(folder: Path, records: Iterable[dict[str, Any]], **settings: Any) -> Path:
    """A folder with these settings and records."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"settings": {"method": "galore", "seed": 1, **settings}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
