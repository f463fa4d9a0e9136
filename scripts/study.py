"""Compare methods fairly: every rate with one seed, then more seeds at each method's best rate, as one table.

    python scripts/study.py configs/studies/quickstart.yaml --out studies/quickstart --jobs 2 \\
        --dataset_path quickstart/data/wiki_intros_bpe4096_128
    python scripts/study.py configs/studies/headlines.yaml --out studies/headlines --jobs 2 \\
        --model MINILM_FOLDER --data sarcasm_headlines.jsonl
    python scripts/study.py configs/studies/winogrande.yaml --out studies/winogrande --jobs 2 \\
        --model MODEL_FOLDER --data winogrande_object_twins.jsonl -- --split_by twins --shuffle_options

The YAML file says which training script, methods, rates (`lrs`) and seeds; flags after `--` go to the training script,
over the file's. It may say `extend: N` (so many further rates where the best is the smallest or the largest),
`keep_models: False`, `baseline` (the method from which the table tells the differences, seed by seed), `start` (flags
of a pre-training run from whose last checkpoint all others start) and, of a method, `warm_up` (flags of a run of its
own before). With `eval_parts: 2` rates are chosen by one part of the validation set, and the table tells the other.

Finished runs are not made again, interrupted ones go on, so that the command may be stopped and given again, also with
methods, rates or seeds added; row after row is made. Writes OUT/table.md and OUT/results.json after each row, and
OUT/rates.png (scores over each method's rate) and OUT/memory.png (over the state) at the end. If the best rate lies at
the end of its range, the table says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _study import folder, plots
from _study.comparison import Study, compare, so_far, table
from _study.file import StudyFile, flags_of, read_study

from peft_pretraining.flags import ConfigError, exit_with_problems


def main() -> int:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments = parser().parse_args(words[:end])
    try:
        study = study_of(arguments, words[end + 1 :])
        if arguments.so_far:  # also while another process makes runs
            rows = write(study, so_far(study), arguments.speeds)
        else:
            with folder.opened(study.out, study.in_common()):
                study.divide_rows()
                rows = write(study, compare(study), arguments.speeds)
    except ConfigError as error:
        return exit_with_problems(error)
    except subprocess.CalledProcessError as error:
        print(f"error: a run failed, see its log beside its folder: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    except folder.RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(study, rows))
    return 0


def write(study: Study, rows: list[dict[str, Any]], speeds: Path | None) -> list[dict[str, Any]]:
    """Write results, table and plots; returns the rows as they were written."""
    rows, program = rows if speeds is None else with_speeds(rows, speeds), study.file.program
    folder.write_results(study.out, rows, table(study, rows))
    plots.plot_rates(rows, program, study.out / "rates.png")
    plots.plot_memory(rows, program, study.out / "memory.png", study.file.baseline)
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s STUDY.yaml --out FOLDER [flags] [-- flags of the training script]",
    )
    made.add_argument("study", type=Path, help="YAML file of the study")
    made.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    made.add_argument("--dataset_path", help="pre-training: folder written by pretokenize.py")
    made.add_argument("--model", help="fine-tuning: folder or hub name of the model that all runs start from")
    made.add_argument("--data", help="fine-tuning: JSON lines with the rows")
    made.add_argument("--methods", help="only these of the file's, comma-separated")
    made.add_argument("--lrs", help="learning rates of every method, comma-separated (default: each method's own)")
    made.add_argument("--seeds", help="comma-separated (default: the file's); the rates are tried with the first")
    made.add_argument("--keep_models", action="store_true", help="keep every run's model, whatever the file says")
    made.add_argument("--so_far", action="store_true", help="make no runs: write table and plots of what there is")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    made.add_argument("--nproc_per_node", type=int, default=0, help="start each run by torchrun, on so many GPUs")
    made.add_argument(
        "--speeds", type=Path, help="JSON, method -> tokens per second, to tell instead of the runs' own speeds"
    )
    return made


def with_speeds(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows with the speeds of a file of benchmarks/study_throughput.py. Raises `ConfigError`."""
    try:
        speeds = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"--speeds {path}: cannot be read ({error})"]) from None
    if not isinstance(speeds, dict) or not all(map(folder.is_number, speeds.values())):
        raise ConfigError([f"--speeds {path}: it must hold methods and numbers"])
    return [{**row, "tokens_per_second": speeds.get(row["method"])} for row in rows]


def study_of(arguments: argparse.Namespace, words: Sequence[str]) -> Study:
    """The study that a command line asks for; `words` are the training script's own. Raises `ConfigError`."""
    file = read_study(arguments.study)
    problems = [] if arguments.jobs >= 1 else [f"--jobs must be a positive number, got {arguments.jobs}"]
    if arguments.nproc_per_node < 0 or (arguments.nproc_per_node and arguments.jobs > 1):
        problems.append(
            f"--nproc_per_node must be positive and goes with --jobs 1, got {arguments.nproc_per_node} and "
            f"{arguments.jobs}"
        )
    inputs = {}
    for name in ("dataset_path", "model", "data"):
        value = getattr(arguments, name)
        if name not in file.program.inputs:
            problems += [] if value is None else [f"--{name} is not for {file.program.script}"]
        elif value is None:
            problems.append(f"--{name} is required for {file.program.script}")
        else:  # a model may be a name of the hub
            inputs[name] = value if name == "model" and not Path(value).exists() else str(Path(value).resolve())
    if problems:
        raise ConfigError(problems)
    return Study(
        _narrowed(file, arguments),
        inputs,
        flags_of(words),
        arguments.out.resolve(),
        arguments.jobs,
        arguments.nproc_per_node,
    )


def _narrowed(file: StudyFile, arguments: argparse.Namespace) -> StudyFile:
    """The file's study with what the command line chooses."""
    names = list(file.methods) if arguments.methods is None else arguments.methods.split(",")
    if unknown := [name for name in names if name not in file.methods]:
        raise ConfigError([f"--methods: {', '.join(unknown)} is unknown; there is {', '.join(file.methods)}"])
    methods = {name: file.methods[name] for name in names}
    if arguments.lrs is not None:
        lrs = folder.distinct_numbers(arguments.lrs, "--lrs")
        methods = {name: dataclasses.replace(method, lrs=lrs) for name, method in methods.items()}
    seeds = file.seeds if arguments.seeds is None else folder.distinct_numbers(arguments.seeds, "--seeds", int)
    keep_models = file.keep_models or arguments.keep_models
    return dataclasses.replace(file, methods=methods, seeds=seeds, keep_models=keep_models)


if __name__ == "__main__":
    sys.exit(main())
