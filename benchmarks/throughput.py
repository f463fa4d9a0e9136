"""Tokens per second of the whole training loop: methods and settings against each other, or beside a bare loop.

    python benchmarks/throughput.py                      # full_rank, llama_9m, 8 x 256 tokens, float32 on the CPU
    python benchmarks/throughput.py --model_config configs/llama_60m.json --run full_rank \\
        --run "galore --rank 128" --run "galore --rank 128 --projected_backward off"
    python benchmarks/throughput.py --model_config configs/llama_350m.json --layers 4 --no-bare \\
        --run "full_rank --compile on" --run "galore --rank 256 --compile on"

Every `--run` is a method and its flags; flags after all others go to every run. All take turns in one process, a few
updates each, so that a machine that slows down slows all; medians are compared, with the first run's. A turn without
refreshes or merges is wanted (`--update_proj_gap`): the first of them fall into the updates before the first turn,
which are not counted, as compilation is. The loop under test reads its blocks from disk in worker processes, clips,
checks for values that are not finite, and writes its metrics; the bare loop (transformers' model and loss, torch's
fused AdamW) has its batches in memory and does none of this.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from peft_pretraining.config import cli  # noqa: E402
from peft_pretraining.distributed import ProcessGroup  # noqa: E402
from peft_pretraining.models.llama import build_model  # noqa: E402
from peft_pretraining.runtime.signals import StopRequest  # noqa: E402
from peft_pretraining.training.build import build  # noqa: E402
from peft_pretraining.training.loop import Run, report, state_bytes, train_step  # noqa: E402
from peft_pretraining.training.profiling import peak_memory_bytes  # noqa: E402
from peft_pretraining.training.screen import Screen  # noqa: E402

BARE = "bare loop, fused AdamW"


def main() -> None:
    arguments, shared = parse()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        shape = with_layers(arguments, Path(scratch))
        data = write_random_blocks(Path(scratch) / "data", shape, arguments.max_length)
        group = ProcessGroup.start(single_device=True)
        runs: dict[str, Run] = {}
        for number, words in enumerate(arguments.run):
            launch = load(arguments, shape, data, Path(scratch) / f"run{number}", [*shlex.split(words), *shared])
            runs[words] = build(launch, group, stack)
        loops = {words: looped_update(run) for words, run in runs.items()}
        if arguments.bare:
            loops[BARE] = bare_update(launch, group)
        times = take_turns(loops, arguments, group)
        for run in runs.values():
            run.tracker.close(0)
        result = summary(times, runs, arguments, group)
    print_table(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default=str(PROJECT / "configs" / "llama_9m.json"))
    parser.add_argument("--layers", type=int, help="decoder layers, instead of the model's")
    parser.add_argument("--run", action="append", help="a method and its flags; may be given several times")
    parser.add_argument("--bare", action=argparse.BooleanOptionalAction, default=True, help="a bare loop beside them")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--turns", type=int, default=8, help="turns of each")
    parser.add_argument("--updates", type=int, default=3, help="updates per turn")
    parser.add_argument("--warm", type=int, default=3, help="updates of each before the first turn")
    parser.add_argument("--json", help="also write the result to this file")
    arguments, shared = parser.parse_known_args()
    arguments.run = arguments.run or ["full_rank"]
    return arguments, shared


def with_layers(arguments: argparse.Namespace, scratch: Path) -> str:
    """The model's JSON, with another number of layers where one is asked for."""
    if arguments.layers is None:
        return str(arguments.model_config)
    shape = {**json.loads(Path(arguments.model_config).read_text()), "num_hidden_layers": arguments.layers}
    cut = scratch / Path(arguments.model_config).name
    cut.write_text(json.dumps(shape))
    return str(cut)


def load(arguments: argparse.Namespace, shape: str, data: Path, save_dir: Path, words: list[str]) -> cli.ParsedArgs:
    """The command line of one run: its method comes first."""
    method, *flags = words
    return cli.load(
        [
            *("--model_config", shape, "--dataset_path", str(data), "--save_dir", str(save_dir)),
            *("--batch_size", str(arguments.batch_size), "--max_length", str(arguments.max_length)),
            *("--method", method, "--lr", "1e-3", "--workers", "1", *flags),
        ]
    )


def write_random_blocks(folder: Path, model_config: str, length: int) -> Path:
    """A pre-tokenised folder of random tokens: speed does not depend on what the text says."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    vocabulary = json.loads(Path(model_config).read_text())["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2048, length), dtype=np.int32)
    features = Features({"input_ids": List(Value("int32"), length=length)})
    split = Dataset.from_dict({"input_ids": list(tokens)}, features=features)
    DatasetDict({"train": split, "validation": split.select(range(8))}).save_to_disk(str(folder))
    described = {"sequence_length": length, "vocab_size": vocabulary, "largest_token_id": vocabulary - 1}
    (folder / "args.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def looped_update(run: Run) -> Callable[[], None]:
    """One update of the project's loop, as `train` does it."""
    screen, stop = Screen(total=10**6, done=0, enabled=False, every=30.0), StopRequest()

    def update() -> None:
        began = time.perf_counter()
        train_step(run, list(islice(run.batches, run.config.batch.gradient_accumulation)), stop)
        for result, _ in run.late.finished():  # on a GPU that before
            report(run, result, time.perf_counter() - began, screen)

    return update


def bare_update(launch: cli.ParsedArgs, group: ProcessGroup) -> Callable[[], None]:
    """One update of transformers' model with its own loss and torch's fused AdamW, batches in memory."""
    config = launch.config
    model = build_model(config.model, launch.facts.model, None, group.device, config.run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    shape = (16, config.batch.batch_size, config.data.max_length)
    batches = torch.randint(0, model.config.vocab_size, shape, device=group.device)
    number = 0

    def update() -> None:
        nonlocal number
        for _ in range(config.batch.gradient_accumulation):
            input_ids = batches[number % len(batches)]
            number += 1
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            (loss / config.batch.gradient_accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def take_turns(
    loops: dict[str, Callable[[], None]], arguments: argparse.Namespace, group: ProcessGroup
) -> dict[str, list[float]]:
    """Seconds per update of each loop, one number per turn."""
    for update in loops.values():
        for _ in range(arguments.warm):
            update()
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(arguments.turns):
        for name, update in loops.items():
            synchronise(group)
            began = time.perf_counter()
            for _ in range(arguments.updates):
                update()
            synchronise(group)
            times[name].append((time.perf_counter() - began) / arguments.updates)
    return times


def synchronise(group: ProcessGroup) -> None:
    if group.device.type == "cuda":
        torch.cuda.synchronize()


def summary(
    times: dict[str, list[float]], runs: dict[str, Run], arguments: argparse.Namespace, group: ProcessGroup
) -> dict[str, Any]:
    reference, device = times[arguments.run[0]], group.device
    rows = []
    for name, seconds in times.items():
        run = runs.get(name, next(iter(runs.values())))
        by_turn = [base / own for base, own in zip(reference, seconds, strict=True)]
        rows.append(
            {
                "run": name,
                "tokens_per_second": run.config.batch.total_batch_size
                * arguments.max_length
                / statistics.median(seconds),
                "ratio": statistics.median(reference) / statistics.median(seconds),
                "ratio_by_turn": [min(by_turn), statistics.median(by_turn), max(by_turn)],
                "milliseconds": [round(1000 * value, 1) for value in seconds],
                "optimizer_state_bytes": state_bytes(run.optimizer) if name in runs else None,
            }
        )
    first = next(iter(runs.values()))
    return {
        "model": Path(arguments.model_config).stem,
        "layers": first.model.config.num_hidden_layers,
        "batch": f"{arguments.batch_size} x {arguments.max_length}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "dtype": str(next(first.model.parameters()).dtype),
        "torch": str(torch.__version__),
        "peak_memory_bytes": peak_memory_bytes(device),
        "rows": rows,
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['model']} ({result['layers']} layers), {result['batch']} tokens a micro-batch, {result['dtype']}")
    print(f"{result['device']}, torch {result['torch']}\n")
    print("| run | tokens/s | of the first | by turn | ms per update |")
    print("|---|--:|--:|--:|--:|")
    for row in result["rows"]:
        low, middle, high = row["ratio_by_turn"]
        print(
            f"| {row['run']} | {row['tokens_per_second']:,.0f} | {row['ratio']:.3f} | {low:.3f} to {high:.3f}, median "
            f"{middle:.3f} | {min(row['milliseconds']):.0f} to {max(row['milliseconds']):.0f} |"
        )


if __name__ == "__main__":
    main()
