"""Tokenise a corpus into blocks for pre-training: `python pretokenize.py --dataset c4 --dataset_config en ...`.

The last line on stdout is the result's folder, `SAVE_DIR/{dataset}_{config}_{tokenizer}_{length}`. Exit code 2 for bad
input, 1 where the result cannot be written: one line per problem on stderr, and nothing left behind.

A large corpus in slices: the same with `--num_shards N --shard I`, for every I from 0 to N - 1, in any order and side
by side; then once with `--num_shards N --merge`. What is finished is not made again.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType

from peft_pretraining.data.pretokenize import CannotWrite, pretokenize
from peft_pretraining.data.pretokenize_config import FOREIGN, PretokenizeConfig, result_path, slice_path
from peft_pretraining.data.slices import merge, pretokenize_slice
from peft_pretraining.data.sources import COMPRESSED, Source, find_source
from peft_pretraining.data.tokenizer import SMALLEST_VOCABULARY
from peft_pretraining.flags import ConfigError, exit_with_problems, parse_command_line, section_flags

FLAGS = [dataclasses.replace(flag, foreign=FOREIGN.get(flag.name, ())) for flag in section_flags(PretokenizeConfig)]


def load(argv: Sequence[str]) -> tuple[PretokenizeConfig, Source]:
    """The flags and the data they name; ConfigError with every problem that shows before data is read."""
    problems: list[str] = []
    given = parse_command_line(FLAGS, argv, prog="pretokenize.py", description=__doc__, problems=problems)
    config = PretokenizeConfig(**{name: item.value for name, item in given.items()})
    config = _which_slice(config, os.environ, problems)
    for name in ("dataset", "save_dir"):
        if name not in given and not any(problem.startswith(f"--{name} ") for problem in problems):
            problems.append(f"--{name} is required")
    warnings: list[str] = []
    source = find_source(config.dataset, config.from_json, problems, warnings) if config.dataset else None
    problems += _tokenizer_problems(config)
    if source is not None:
        problems += _validation_problems(config, source)
    if config.save_dir:
        problems += _place_problems(config, source)
    if problems:
        raise ConfigError(problems)
    if source.kind != "hub" and config.dataset_config:
        warnings.append("--dataset_config only names the result: local data has no configurations")
    if "text_field" in given and not source.has_fields:
        warnings.append("--text_field has no effect on plain text files")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return config, source


def _which_slice(config: PretokenizeConfig, environ: Mapping[str, str], problems: list[str]) -> PretokenizeConfig:
    """With `--shard` filled in from Slurm's environment, where it is to be."""
    task = environ.get("SLURM_ARRAY_TASK_ID")
    if config.num_shards and config.shard is None and not config.merge and task is not None:
        config = dataclasses.replace(config, shard=int(task))
    if config.num_shards is None:
        given = {"shard": config.shard is not None, "merge": config.merge}
        problems += [f"--{name} needs --num_shards N" for name, is_given in given.items() if is_given]
    elif config.shard is None and not config.merge:
        problems.append(f"--num_shards {config.num_shards} needs --shard I (or SLURM_ARRAY_TASK_ID), or --merge")
    elif config.shard is not None and config.merge:
        problems.append(f"--shard {config.shard} and --merge contradict each other: give one of them")
    elif config.shard is not None and config.shard >= config.num_shards:
        problems.append(f"--shard {config.shard} must be below --num_shards {config.num_shards}")
    if config.num_shards and config.train_tokenizer:
        problems.append(
            f"--train_tokenizer {config.train_tokenizer} needs all the text, not slices of it: train it first, on a "
            "part (--take), and pass the result's folder as --tokenizer"
        )
    return config


def _tokenizer_problems(config: PretokenizeConfig) -> list[str]:
    problems = []
    if config.train_tokenizer is not None:
        if config.train_tokenizer < SMALLEST_VOCABULARY:
            problems.append(
                f"--train_tokenizer {config.train_tokenizer} must be at least {SMALLEST_VOCABULARY}: "
                "256 bytes, two special tokens, and something to learn"
            )
        if config.tokenizer is not None:
            problems.append(f"--tokenizer {config.tokenizer} contradicts --train_tokenizer {config.train_tokenizer}")
    return problems


def _validation_problems(config: PretokenizeConfig, source: Source) -> list[str]:
    """Whether slices will hold out a block: none of them sees enough to find out, and the merge comes too late."""
    files = source.files.get("train", [])
    plain = files and not any(file.suffix in COMPRESSED or file.suffix == ".parquet" for file in files)
    if not config.num_shards or config.take is not None or "validation" in source.files or not plain:
        return []
    size = sum(file.stat().st_size for file in files)
    if size * config.validation_fraction >= config.sequence_length:  # a token has a byte at least
        return []
    return [
        f"--validation_fraction {config.validation_fraction:g}: of {size} bytes in all, slices would hold out less "
        f"than one block of {config.sequence_length} tokens; make it larger, or leave --num_shards out"
    ]


def _place_problems(config: PretokenizeConfig, source: Source | None) -> list[str]:
    """Whether the result may be written where it is to go."""
    if source is not None and not config.overwrite and os.path.exists(wanted := result_path(config, source)):
        # A slice that is there already has nothing to write: its command may be given again at any time.
        if config.shard is None or not slice_path(config, source, config.shard).exists():
            return [f"{wanted} exists already (--overwrite replaces it)"]
    save_dir = Path(config.save_dir)
    nearest = next(folder for folder in (save_dir, *save_dir.absolute().parents) if os.path.exists(folder))
    if not nearest.is_dir():
        return [f"--save_dir {config.save_dir}: {nearest} is not a folder"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"--save_dir {config.save_dir}: no permission to write in {nearest}"]
    return []


def _end(number: int, frame: FrameType | None) -> None:
    """An exception, so that half a result and workers are cleaned up; further signals do not disturb that."""
    for further in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(further, signal.SIG_IGN)
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config, source = load(sys.argv[1:] if argv is None else argv)
        command = merge if config.merge else pretokenize if config.shard is None else pretokenize_slice
        print(command(config, source))
        return 0
    except ConfigError as error:
        return exit_with_problems(error)
    except (CannotWrite, MemoryError, BrokenProcessPool) as error:
        reasons = {MemoryError: "out of memory", BrokenProcessPool: "a tokenising process died (out of memory?)"}
        print(f"error: {reasons.get(type(error), error)}", file=sys.stderr)
        return 1


def script() -> int:
    """The whole life of a process: `main`, and signals that leave nothing behind."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _end)
    try:
        return main()
    except KeyboardInterrupt:
        print("error: interrupted; nothing is left behind", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(script())
