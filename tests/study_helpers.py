"""A small study, and what takes the place of its training processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import helpers

sys.path.insert(0, str(helpers.PROJECT / "scripts"))

import study
import sweep
from _study import comparison, file, finetuning, folder, plots, programs

__all__ = ["STUDY", "Trainings", "comparison", "file", "finetuning", "folder", "plots", "programs", "study", "sweep"]

STUDY = """
seeds: [42, 1]
common: {model_config: m.json, num_training_steps: 10}
methods:
  galore: {lrs: [0.1, 0.2], flags: {method: galore}}
"""


class Trainings:
    """Takes the place of the training processes: each leaves the metrics, or results, that it is told to."""

    def __init__(self, perplexity=lambda lr: lr, more: bytes = b"", part=None):
        """`part`: the perplexity of the second part of the evaluation; there are no parts without it."""
        self.commands, self.perplexity, self.more, self.part, self.words = [], perplexity, more, part, []

    def __call__(self, command, **_):
        first = next(index for index, word in enumerate(command) if word.endswith(".py")) + 1
        self.words.append(command[1:first])
        flags = dict(zip(command[first::2], command[first + 1 :: 2], strict=False))
        self.commands.append(flags)
        value = self.perplexity(float(flags["--lr"]))
        if "--output_dir" in flags:
            return self.fine_tuned(Path(flags["--output_dir"]), value)
        record = {"update_step": 10, "final_eval_perplexity": value, "optimizer_state_bytes": 8}
        if self.part is not None:
            parts = {"final_eval_perplexity_0": value, "final_eval_perplexity_1": self.part(float(flags["--lr"]))}
            record |= {"final_eval_perplexity": None, "throughput_tokens": 1234.5, **parts}
        path = Path(flags["--save_dir"]) / "metrics.jsonl"
        path.write_bytes(json.dumps(record).encode() + b"\n" + self.more)

    def fine_tuned(self, folder, accuracy):
        results = {"eval_accuracy": accuracy, "test_accuracy": accuracy / 2, "optimizer_state_bytes": 2e6}
        results |= {"losses": [3.0, *[1.0] * 18, 0.5, 1.5], "best_step": 4, "trainable_parameters": 7}
        (folder / "all_results.json").write_text(json.dumps(results))
        (folder / "model.safetensors").touch()
