"""Validation perplexity over learning rates and seeds, one run each: how the rates in this project were chosen.

    python scripts/sweep.py --out sweeps/galore --lrs 0.005,0.01,0.02 --seeds 42 -- \
        --method galore --rank 40 --model_config configs/llama_tiny.json --dataset_path DATA --batch_size 8 ...

Everything after `--` goes to torchrun_main.py. Runs that are finished are not run again; one that was interrupted goes
on. Prints a table and writes it to OUT/table.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--lrs", required=True, help="learning rates, comma-separated")
    parser.add_argument("--seeds", default="42", help="seeds, comma-separated (default: 42)")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="-- and then flags of torchrun_main.py")
    arguments = parser.parse_args()
    rows = []
    for lr in arguments.lrs.split(","):
        for seed in arguments.seeds.split(","):
            perplexity = train(arguments.out / f"lr{lr}_seed{seed}", lr, seed, arguments.flags[1:])
            rows.append({"lr": float(lr), "seed": int(seed), "perplexity": perplexity})
            print(f"lr {lr:>8}  seed {seed:>4}  validation perplexity {perplexity:.2f}", flush=True)
    best = min(rows, key=lambda row: row["perplexity"])
    print(f"best: lr {best['lr']:g}, seed {best['seed']}, validation perplexity {best['perplexity']:.2f}")
    (arguments.out / "table.json").write_text(json.dumps({"flags": arguments.flags[1:], "runs": rows}, indent=2) + "\n")
    return 0


def train(save_dir: Path, lr: str, seed: str, flags: list[str]) -> float:
    """Run, or finish, one training; its last validation perplexity."""
    command = [sys.executable, str(PROJECT / "torchrun_main.py"), *flags]
    command += ["--lr", lr, "--seed", seed, "--save_dir", str(save_dir), "--autoresume", "True"]
    save_dir.mkdir(parents=True, exist_ok=True)
    with open(save_dir.with_name(save_dir.name + ".log"), "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    records = map(json.loads, (save_dir / "metrics.jsonl").read_text().splitlines())
    return [record["final_eval_perplexity"] for record in records if "final_eval_perplexity" in record][-1]


if __name__ == "__main__":
    sys.exit(main())
