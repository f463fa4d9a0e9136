"""Tokens per second of the whole training loop, next to a bare loop of the same model with torch's fused AdamW.

    python benchmarks/throughput.py                                   # llama_9m, 8 x 256 tokens, float32 on the CPU
    python benchmarks/throughput.py --method galore --rank 128 --model_config configs/llama_350m.json --batch_size 64

The two take turns in one process, a few updates each, so that a machine that slows down slows both; medians are
compared. The loop under test reads its blocks from disk in worker processes, clips, checks for non-finite values, and
writes its metrics; the bare loop has its batches in memory and does none of this. More flags go to torchrun_main.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from peft_pretraining.config import cli  # noqa: E402
from peft_pretraining.distributed import ProcessGroup  # noqa: E402
from peft_pretraining.models.llama import build_model  # noqa: E402
from peft_pretraining.runtime.signals import StopRequest  # noqa: E402
from peft_pretraining.training.build import build  # noqa: E402
from peft_pretraining.training.loop import Run, report, state_bytes, train_step  # noqa: E402
from peft_pretraining.training.profiling import peak_memory_bytes  # noqa: E402


def main() -> None:
    arguments, flags = parse()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        data = write_random_blocks(Path(scratch) / "data", arguments.model_config, arguments.max_length)
        launch = cli.load(
            [
                *("--model_config", arguments.model_config, "--dataset_path", str(data)),
                *("--batch_size", str(arguments.batch_size), "--save_dir", f"{scratch}/run"),
                *("--dtype", arguments.dtype),
                *("--method", arguments.method, "--lr", "1e-3", "--workers", "8", *flags),
            ]
        )
        group = ProcessGroup.start(single_device=True)
        run = build(launch, group, stack)
        bare = bare_update(launch, group)
        tokens = run.config.batch.total_batch_size * arguments.max_length
        times = take_turns({"loop": looped_update(run), "bare": bare}, arguments.turns, arguments.updates, group)
        run.tracker.close(0)
    result = summary(times, tokens, run, arguments)
    print_table(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default=str(PROJECT / "configs" / "llama_9m.json"))
    parser.add_argument("--method", default="full_rank")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--turns", type=int, default=8, help="turns of each loop")
    parser.add_argument("--updates", type=int, default=3, help="updates per turn")
    parser.add_argument("--json", help="also write the result to this file")
    return parser.parse_known_args()


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
    bar, stop = tqdm(total=10**6, file=sys.stderr, mininterval=0.5), StopRequest()

    def update() -> None:
        began = time.perf_counter()
        result = train_step(run, list(islice(run.batches, run.config.batch.gradient_accumulation)), stop)
        report(run, result, time.perf_counter() - began, bar)

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
    loops: dict[str, Callable[[], None]], turns: int, updates: int, group: ProcessGroup
) -> dict[str, list[float]]:
    """Seconds per update of each loop, one number per turn, after one turn of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(turns + 1):
        for name, update in loops.items():
            synchronise(group)
            began = time.perf_counter()
            for _ in range(updates):
                update()
            synchronise(group)
            if turn > 0:
                times[name].append((time.perf_counter() - began) / updates)
    return times


def synchronise(group: ProcessGroup) -> None:
    if group.device.type == "cuda":
        torch.cuda.synchronize()


def summary(times: dict[str, list[float]], tokens: int, run: Run, arguments: argparse.Namespace) -> dict:
    device = run.group.device
    return {
        "model": Path(arguments.model_config).stem,
        "method": arguments.method,
        "tokens_per_update": tokens,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "dtype": str(next(run.model.parameters()).dtype),
        "torch": str(torch.__version__),
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in times.items()},
        "milliseconds_per_update": {
            name: [round(1000 * value, 2) for value in values] for name, values in times.items()
        },
        "ratio": statistics.median(times["bare"]) / statistics.median(times["loop"]),
        "ratio_by_turn": [bare / loop for bare, loop in zip(times["bare"], times["loop"], strict=True)],
        "optimizer_state_bytes": state_bytes(run.optimizer),
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def print_table(result: dict) -> None:
    print(f"{result['model']}, {result['method']}, {result['tokens_per_update']} tokens per update, {result['dtype']}")
    print(f"{result['device']}, torch {result['torch']}")
    for name, label in (("loop", "this project"), ("bare", "bare loop, fused AdamW")):
        times = result["milliseconds_per_update"][name]
        print(
            f"  {label:<24} {result['tokens_per_second'][name]:>12,.0f} tokens/s   median of {len(times)} turns, "
            f"{min(times):.1f} to {max(times):.1f} ms per update"
        )
    by_turn = sorted(result["ratio_by_turn"])
    print(f"  ratio {result['ratio']:.3f} (by turn {by_turn[0]:.3f} to {by_turn[-1]:.3f})")


if __name__ == "__main__":
    main()
