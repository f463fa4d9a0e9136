"""Tokens per second of every method of a study, all in one process, in turns.

    python benchmarks/study_throughput.py configs/studies/quickstart.yaml --dataset_path DATA --json speeds.json

Each method has its settings from the file and its first rate. A turn is of so many updates that refreshes and merges
have their share in it (the default suits the quickstart's gaps). A method that starts by a warm-up run starts from
random weights here. `study_report.py --speeds` puts the numbers into a study's table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import throughput  # this folder's; it makes the project importable

sys.path.insert(0, str(throughput.PROJECT / "scripts"))

from _study.comparison import Study
from _study.file import read_study

from peft_pretraining.config import cli
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.training.build import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file of a pre-training study")
    parser.add_argument("--dataset_path", required=True, help="folder written by pretokenize.py")
    parser.add_argument("--methods", help="only these of the file's, comma-separated")
    parser.add_argument("--turns", type=int, default=3, help="turns of each")
    parser.add_argument("--updates", type=int, default=24, help="updates per turn")
    parser.add_argument("--warm", type=int, default=2, help="updates of each before the first turn")
    parser.add_argument("--json", type=Path, required=True, help="write method -> tokens per second to this file")
    arguments = parser.parse_args()
    file = read_study(arguments.study)
    names = arguments.methods.split(",") if arguments.methods else list(file.methods)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        study = Study(file, {"dataset_path": arguments.dataset_path}, {}, Path(scratch))
        group = ProcessGroup.start(single_device=True)
        runs = {}
        for name in names:
            method = file.methods[name]
            flags = study.flags(method.lrs[0], file.seeds[0], method.flags) | {"save_dir": Path(scratch) / name}
            words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
            runs[name] = build(cli.load(words), group, stack)
        loops = {name: throughput.looped_update(run) for name, run in runs.items()}
        times = throughput.take_turns(loops, arguments, group)
        for run in runs.values():
            run.tracker.close(0)
    speeds = {}
    for name, seconds in times.items():
        batch, length = runs[name].config.batch.total_batch_size, runs[name].config.data.max_length
        assert batch is not None and length is not None, "they were derived"
        speeds[name] = batch * length / statistics.median(seconds)
        print(f"{name:<28} {speeds[name]:>10,.0f} tokens/s", flush=True)
    arguments.json.write_text(json.dumps(speeds, indent=2) + "\n")


if __name__ == "__main__":
    main()
