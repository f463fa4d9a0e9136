"""Launch finished runs by the hundred, and count how the processes ended: whatever is wrong once in a hundred times.

    python tests/launch_many.py --launches 200 --methods relora golore_adapter --layouts fsdp ddp

Each launch is the real torchrun with two processes and a model of 30,000 weights. `--hold_lock` makes the race of
runtime/leaving.py more likely: the main thread keeps the interpreter's lock for a while just before the interpreter
ends, so that threads of gloo that want it then are waiting for it. Prints a table, and the log of every launch that did
not exit with 0; exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import helpers
from conftest import write_blocks, write_model

_PATIENCE = 300.0
_MORE = {
    "full_rank": {},
    "relora": {"rank": 4, "relora": 3, "cycle_length": 3, "restart_warmup_steps": 1},
    "lora": {"rank": 4},
    "switchlora": {"rank": 4},
}
_PROJECTED = {"rank": 4, "update_proj_gap": 3}
_HOLD_LOCK = """
import atexit, ctypes, sys
atexit.register(ctypes.PyDLL(None).usleep, 300_000)  # called last, as it is registered first; keeps the lock meanwhile
import torchrun_main
from peft_pretraining.runtime.signals import run_script
sys.exit(run_script(torchrun_main.main))
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--launches", type=int, default=200, help="how many in all, the combinations in turn")
    parser.add_argument("--methods", nargs="+", default=["relora", "golore_adapter"])
    parser.add_argument("--layouts", nargs="+", default=["fsdp"], choices=["fsdp", "ddp"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--async_save", action="store_true", help="write checkpoints beside the training")
    parser.add_argument("--hold_lock", action="store_true", help="make the race at the end likelier")
    options = parser.parse_args(argv)
    combinations = [(method, layout) for method in options.methods for layout in options.layouts]
    ends: dict[tuple[str, str], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {"model_config": write_model(folder / "llama.json"), "dataset_path": write_blocks(folder / "data")}
        for number in range(options.launches):
            method, layout = combinations[number % len(combinations)]
            code, log = _launch(folder, number, {**files, **_settings(method, layout, options)}, options)
            ends[method, layout][code] += 1
            if code:
                print(f"launch {number} ({method}, {layout}) ended with {code}:\n{log}", flush=True)
            if (number + 1) % 10 == 0:
                print(f"{number + 1} launches, {time.monotonic() - began:.0f} s", flush=True)
    print("| method | layout | launches | exit codes |\n|---|---|--:|---|")
    for (method, layout), codes in ends.items():
        shown = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items()))
        print(f"| {method} | {layout} | {codes.total()} | {shown} |")
    return int(any(code for codes in ends.values() for code in codes))


def _settings(method: str, layout: str, options: argparse.Namespace) -> dict[str, object]:
    return {
        **{"batch_size": 4, "total_batch_size": 4 * options.processes, "lr": 1e-2, "warmup_steps": 2, "workers": 1},
        **{"num_training_steps": 6, "save_every": 3, "eval_every": 3, "method": method, "distributed_type": layout},
        **({"async_save": True} if options.async_save else {}),
        **_MORE.get(method, _PROJECTED),
    }


def _launch(folder: Path, number: int, settings: dict[str, object], options: argparse.Namespace) -> tuple[int, str]:
    """One run to its end: torchrun's exit code and what was printed."""
    program = helpers.PROJECT / "torchrun_main.py"
    if options.hold_lock:
        program = folder / "hold_lock.py"
        program.write_text(_HOLD_LOCK)
    words = [f"--{name}={value}" for name, value in {**settings, "save_dir": folder / f"run{number}"}.items()]
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    done = subprocess.run(
        [*agent, str(program), *words],
        **{"env": helpers.child_environment(PYTHONPATH=str(helpers.PROJECT)), "cwd": folder, "text": True},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_PATIENCE,
    )
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
