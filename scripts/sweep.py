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

from _study import folder
from _study.folder import RunFailed, distinct_numbers
from _study.pretraining import train

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.flags import ConfigError, exit_with_problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--lrs", required=True, help="learning rates, comma-separated")
    parser.add_argument("--seeds", default="42", help="seeds, comma-separated (default: 42)")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="-- and then flags of torchrun_main.py")
    arguments = parser.parse_args()
    flags = arguments.flags[1:] if arguments.flags[:1] == ["--"] else arguments.flags
    try:
        lrs = dict(zip(distinct_numbers(arguments.lrs, "--lrs"), arguments.lrs.split(","), strict=True))
        seeds = distinct_numbers(arguments.seeds, "--seeds", int)
        with folder.opened(arguments.out, {"flags": flags}):
            return sweep(arguments.out, lrs, seeds, flags)
    except ConfigError as error:
        return exit_with_problems(error)
    except subprocess.CalledProcessError as error:
        print(f"error: a run failed, see its log beside its folder: {' '.join(map(str, error.cmd))}", file=sys.stderr)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def sweep(out: Path, lrs: dict[float, str], seeds: tuple[int, ...], flags: list[str]) -> int:
    """All runs, one after the other. `lrs` are the rates as they were given, by their values."""
    rows = []
    for lr, as_given in lrs.items():
        for seed in seeds:
            perplexity = train(out / f"lr{as_given}_seed{seed}", [*flags, "--lr", as_given, "--seed", str(seed)])
            rows.append({"lr": lr, "seed": seed, "perplexity": perplexity})
            print(f"lr {as_given:>8}  seed {seed:>4}  validation perplexity {perplexity:.2f}", flush=True)
    best = min(rows, key=lambda row: row["perplexity"])
    print(f"best: lr {best['lr']:g}, seed {best['seed']}, validation perplexity {best['perplexity']:.2f}")
    content = folder.without_infinities({"flags": flags, "runs": rows})
    run_dir.write_atomically(out / "table.json", json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
