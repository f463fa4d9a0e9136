"""Compare finished or running runs: a table on stdout, and a PNG of their losses over tokens.

python -m peft_pretraining.report.compare RUN_DIR [RUN_DIR ...] --plot comparison.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining import run_dir
from peft_pretraining.flags import ConfigError, exit_with_problems

COLUMNS = ("method", "validation perplexity", "optimizer-state MB", "tokens/s", "seconds")

_COLOURS = ("#1f5fa8", "#c4501b", "#2e7d4f", "#7a4fa3", "#8a6d00", "#a33a5e", "#3f7f93")
_SMOOTHED_SHARE = 50  # training losses are averaged over 1/50 of the run


@dataclass(frozen=True)
class RunRecord:
    """What one run's folder says."""

    name: str
    settings: dict[str, Any]
    updates: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Raises `ConfigError` when the folder is not that of a run that has been evaluated."""
        metrics, config = folder / run_dir.METRICS_FILE, run_dir.read_run_config(folder)
        if config is None or not metrics.is_file():
            raise ConfigError([f"{folder} is not the folder of a run ({run_dir.CONFIG_FILE} or metrics are missing)"])
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        updates = [record for record in records if "loss" in record]
        evaluations = [record for record in records if "final_eval_loss" in record]
        if not evaluations:
            raise ConfigError([f"{folder} has not been evaluated yet"])
        return cls(folder.name, config["settings"], updates, evaluations)

    @property
    def method(self) -> str:
        return self.settings["method"]

    def row(self) -> dict[str, Any]:
        """One line of the table: `COLUMNS`, and the perplexity before training."""
        last = self.evaluations[-1]
        speeds = [update["throughput_tokens"] for update in self.updates]
        return {
            "method": self.method,
            "validation perplexity": last["final_eval_perplexity"],
            "perplexity before": self.evaluations[0]["final_eval_perplexity"],
            "optimizer-state MB": last["optimizer_state_bytes"] / 1e6,
            "tokens/s": statistics.median(speeds) if speeds else 0.0,
            "seconds": sum(update["step_time"] for update in self.updates),
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    digits = {"validation perplexity": 2, "optimizer-state MB": 2, "tokens/s": 0, "seconds": 0}
    cells = [[f"{row[name]:,.{digits[name]}f}" if name in digits else row[name] for name in COLUMNS] for row in rows]
    widths = [max(len(line[column]) for line in [COLUMNS, *cells]) for column in range(len(COLUMNS))]

    def line(values: Sequence[str]) -> str:
        first, *others = zip(values, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{value:>{width}}" for value, width in others) + " |"

    ruler = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(COLUMNS), line(ruler), *map(line, cells)])


def plot(runs: Sequence[RunRecord], path: Path) -> None:
    """Training loss (lines, averaged) and validation loss (points) over tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    for run, colour in zip(runs, _COLOURS * len(runs), strict=False):
        tokens, losses = _smoothed(run.updates)
        axes.plot(tokens, losses, color=colour, linewidth=1.6, label=f"{run.method}, training")
        axes.plot(
            [record["tokens_seen"] / 1e6 for record in run.evaluations],
            [record["final_eval_loss"] for record in run.evaluations],
            **{"color": colour, "marker": "o", "markersize": 5, "linestyle": "none"},
            label=f"{run.method}, validation (perplexity {run.evaluations[-1]['final_eval_perplexity']:.1f})",
        )
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _smoothed(updates: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Tokens in millions and the mean loss of the last few updates up to there; skipped updates are left out."""
    kept = [update for update in updates if not update.get("skipped")]
    window = max(1, len(kept) // _SMOOTHED_SHARE)
    losses = [update["loss"] for update in kept]
    means = [statistics.fmean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]
    return [update["tokens_seen"] / 1e6 for update in kept], means


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--plot", type=Path, help="write a PNG of loss over tokens to this file")
    parser.add_argument("--json", type=Path, help="write the table's rows to this file")
    arguments = parser.parse_args(argv)
    try:
        runs = [RunRecord.read(folder) for folder in arguments.runs]
    except ConfigError as error:
        return exit_with_problems(error)
    rows = [run.row() for run in runs]
    print(table(rows))
    if arguments.plot:
        plot(runs, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
