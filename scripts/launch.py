"""Run a recipe: what `scripts/pretrain.sh` starts. Prints the torchrun command, runs it, passes signals on.

SIGUSR1 means "finish the update, save and exit". It must not go through torchrun: that either dies of it or, told to
handle it, kills the training processes a grace period later, maybe in the middle of a large checkpoint. So torchrun
ignores it here and the training processes, its children, get it directly. SIGTERM, SIGINT and SIGHUP go to torchrun,
which passes them on but does kill the training processes when the grace period is over.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import recipe

from peft_pretraining.flags import ConfigError, exit_with_problems, positive_int

GRACE_SECONDS = "120"  # torchrun's own 30 s are short for a checkpoint of several billion weights


def main(argv: Sequence[str] | None = None) -> int:
    arguments, overrides = _parser().parse_known_args(argv)
    size, method = arguments.size.lower(), arguments.method
    try:
        recipe.check_names(size, method)
        _refuse_training_config(overrides)
        processes = _positive("nproc", arguments.nproc) if arguments.nproc else max(1, visible_gpus())
        devices = recipe.Devices(processes, _positive("nnodes", arguments.nnodes), arguments.rdzv_endpoint)
        command = recipe.command(size, method, devices, overrides)
    except ConfigError as error:
        return exit_with_problems(error)
    print(shlex.join(command), flush=True)
    return 0 if arguments.dry_run else run(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/pretrain.sh",
        description="Pre-train by a recipe: prints the torchrun command and runs it. All other flags are passed on to "
        "torchrun_main.py after the recipe's and win over them; --dataset_path DIR is the one that a run needs.",
        allow_abbrev=False,
    )
    parser.add_argument("size", help=", ".join(recipe.known_sizes()))
    parser.add_argument("method", help=", ".join(recipe.known_methods()))
    parser.add_argument("--dry_run", action="store_true", help="print the command only")
    parser.add_argument("--nproc", metavar="N", help="processes per node (default: the number of GPUs found, else 1)")
    parser.add_argument("--nnodes", metavar="N", default="1", help="nodes (default: 1)")
    parser.add_argument("--rdzv_endpoint", metavar="HOST:PORT", help="where the nodes meet; unused with one node")
    return parser


def _positive(name: str, text: str) -> int:
    try:
        return positive_int(text)
    except ValueError as error:
        raise ConfigError([f"--{name} {error}, got {text!r}"]) from None


def _refuse_training_config(overrides: Sequence[str]) -> None:
    if any(word.partition("=")[0] == "--training_config" for word in overrides):
        problem = "--training_config would lose to the recipe's flags: give it to torchrun_main.py, without a recipe"
        raise ConfigError([problem])


def visible_gpus() -> int:
    """Number of NVIDIA GPUs that this process may use, without the seconds that importing torch takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(1 for device in visible.split(",") if device.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return sum(1 for line in listing.stdout.splitlines() if line.startswith("GPU "))


def run(command: Sequence[str]) -> int:
    """Run torchrun to its end, passing signals on; its exit code (128 + n if signal n killed it)."""
    if shutil.which(command[0]) is None:
        return exit_with_problems(ConfigError([f"{command[0]} not found: install torch for {sys.executable}"]))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited by torchrun, until the training processes handle it
    # In a session of its own: a signal to this process's group (Ctrl-C, Slurm) reaches torchrun once, from here.
    torchrun = subprocess.Popen(command, start_new_session=True)

    def save_and_stop(*_: object) -> None:
        for pid in children(torchrun.pid):
            _send(pid, signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, save_and_stop)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup, SIGHUP stays ignored
            signal.signal(number, lambda received, _: _send(torchrun.pid, received))
    code = torchrun.wait()
    return code if code >= 0 else 128 - code


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended meanwhile
        pass


def children(parent: int) -> list[int]:
    """Ids of the processes that `parent` started (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...": the name may contain spaces and parentheses
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except OSError:  # it ended meanwhile
            pass
    return found


if __name__ == "__main__":
    sys.exit(main())
