"""What the way of computing bases, and spreading their refreshes, does to a training: the quickstart's GaLore, shorter.

    python benchmarks/refresh_trial.py --data quickstart/data/wiki_intros_bpe4096_128 --out trial [--updates 500]

Runs of `configs/llama_tiny.json` at rank 40, as many refreshes as the quickstart's, one process after the other; those
that are there already are not made again, and one that was interrupted goes on. Prints the last validation loss by seed
and the mean with its standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

VARIANTS = {
    "exact": ["--svd_method", "exact"],
    "subspace": ["--svd_method", "subspace"],
    "exact, staggered": ["--svd_method", "exact", "--stagger_refresh", "True"],
    "subspace, staggered": ["--svd_method", "subspace", "--stagger_refresh", "True"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "quickstart/data/wiki_intros_bpe4096_128")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--gap", type=int, default=50, help="updates between two refreshes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    losses: dict[str, list[float]] = {name: [] for name in args.variants}
    for seed in args.seeds:
        for name in args.variants:
            losses[name].append(train(args, name, seed))
            print(f"{name}, seed {seed}: {losses[name][-1]:.4f}", flush=True)
    print(f"\n| validation loss after {args.updates} updates, gap {args.gap} | mean | standard deviation | seeds |")
    print("|---|---|---|---|")
    for name, values in losses.items():
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        each = ", ".join(f"{value:.4f}" for value in values)
        print(f"| {name} | {statistics.mean(values):.4f} | {deviation:.4f} | {each} |")


def train(args: argparse.Namespace, name: str, seed: int) -> float:
    """The last validation loss of a run."""
    folder = args.out / f"{name.replace(', ', '_')}_{seed}"
    if (found := last_loss(folder, args.updates)) is None:
        flags = {
            "model_config": ROOT / "configs/llama_tiny.json",
            "dataset_path": args.data,
            "batch_size": 8,
            "num_training_steps": args.updates,
            "warmup_steps": args.updates // 10,
            "eval_every": args.updates,
            "save_every": args.updates // 2,
            "keep_checkpoints": 1,
            "autoresume": True,
            "seed": seed,
            "method": "galore",
            "rank": 40,
            "scale": 0.25,
            "update_proj_gap": args.gap,
            "lr": 0.02,
            "save_dir": folder,
        }
        command = [sys.executable, str(ROOT / "torchrun_main.py")]
        command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        subprocess.run([*command, *VARIANTS[name]], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = last_loss(folder, args.updates)
    if found is None:
        raise SystemExit(f"{folder} has no validation loss of update {args.updates}")
    return found


def last_loss(folder: Path, updates: int) -> float | None:
    """Of the end of a run; None where it is not there yet."""
    found = None
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record.get("update_step") == updates and "final_eval_loss" in record:
                found = float(record["final_eval_loss"])
    return found


if __name__ == "__main__":
    main()
