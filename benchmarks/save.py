"""Seconds that training waits for a checkpoint, written before it goes on and beside it (`--async_save`).

    python benchmarks/save.py                                                     # llama_9m, one process
    torchrun --standalone --nproc-per-node 2 benchmarks/save.py --distributed_type fsdp

One run saves in both ways in turn, with updates in between, into a temporary folder (TMPDIR chooses the disk). More
flags go to torchrun_main.py. Times are those of the main process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from throughput import PROJECT, synchronise, write_random_blocks  # which makes the package importable

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.config import cli
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.training.build import build
from peft_pretraining.training.loop import Run, next_micro_batches, train_step


def main() -> None:
    arguments, flags = parse()
    group = ProcessGroup.start()
    scratch = Path(group.from_main(tempfile.mkdtemp() if group.is_main else ""))
    try:
        if group.is_main:
            write_random_blocks(scratch / "data", arguments.model_config, arguments.max_length)
        group.barrier()
        with ExitStack() as stack:
            run = build(launch(arguments, flags, scratch), group, stack)
            times = measure(run, arguments.rounds, arguments.updates)
            run.tracker.close(0)
        result = summary(times, run, arguments)
        group.barrier()
    finally:
        if group.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
    if group.is_main:
        print_table(result)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    group.stop()


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default=str(PROJECT / "configs" / "llama_9m.json"))
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--updates", type=int, default=3, help="updates after each of them")
    parser.add_argument("--json", help="also write the result to this file")
    return parser.parse_known_args()


def launch(arguments: argparse.Namespace, flags: list[str], scratch: Path) -> cli.ParsedArgs:
    settings = {
        **{"model_config": arguments.model_config, "dataset_path": scratch / "data", "save_dir": scratch / "run"},
        **{"batch_size": 1, "dtype": "float32", "lr": 1e-3, "workers": 0, "keep_checkpoints": 1},
    }
    return cli.load([*(str(part) for name, value in settings.items() for part in (f"--{name}", value)), *flags])


def measure(run: Run, rounds: int, updates: int) -> dict[str, list[float]]:
    """Seconds: "waits" for a save of each kind, "until complete", and of updates alone and beside a save."""
    names = ("waits, sync", "waits, async", "until complete, async", "update, alone", "update, beside a save")
    times: dict[str, list[float]] = {name: [] for name in names}
    stop = StopRequest()

    def update(name: str | None) -> None:
        busy = run.checkpointer.in_flight
        began = time.perf_counter()
        train_step(run, next_micro_batches(run), stop)
        synchronise(run.group)
        if name is not None and busy == run.checkpointer.in_flight:  # not one during which the save ended
            times["update, beside a save" if busy else name].append(time.perf_counter() - began)

    for turn in range(rounds + 1):
        for kind in ("sync", "async"):
            warm = turn > 0  # the first save of each kind loads modules, and the first update connects the ranks
            update(None)
            run.group.barrier()
            folder = run.checkpointer.save_dir / f"model_{run.state.update_step}"
            began, began_at = time.perf_counter(), time.time()
            run.checkpointer.save(run.state, "giving up", beside=kind == "async")
            if warm:
                times[f"waits, {kind}"].append(time.perf_counter() - began)
            for _ in range(updates):
                update("update, alone" if warm else None)
            run.checkpointer.wait()
            if warm and kind == "async":
                written = (folder / run_dir.MANIFEST_FILE).stat().st_mtime  # the last file
                times["until complete, async"].append(written - began_at)
    return times


def summary(times: dict[str, list[float]], run: Run, arguments: argparse.Namespace) -> dict:
    newest = run_dir.completed_checkpoints(run.checkpointer.save_dir)[0][1]
    return {
        "model": Path(arguments.model_config).stem,
        "method": run.config.method.method,
        "distributed_type": run.config.distributed.distributed_type,
        "world_size": run.group.world_size,
        "device": run.group.device.type,
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()),
        "failed_saves": run.checkpointer.failed_saves,
        "seconds": times,
    }


def print_table(result: dict) -> None:
    print(
        f"{result['model']}, {result['method']}, {result['world_size']} x {result['device']}, "
        f"{result['distributed_type']}: {result['checkpoint_bytes'] / 1e6:.0f} MB, {result['failed_saves']} failed"
    )
    print("| seconds | median | least | most | of |\n|---|---:|---:|---:|---:|")
    for name, values in result["seconds"].items():
        if values:
            print(
                f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} | {len(values)} |"
            )


if __name__ == "__main__":
    main()
