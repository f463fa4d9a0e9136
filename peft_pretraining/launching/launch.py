"""Run a recipe: what `scripts/pretrain.sh` starts. Prints the torchrun command, runs it, passes signals on.

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C mean "finish the update, save and exit". They must not go through torchrun: it
either dies of them or kills the training processes a grace period later, maybe in the middle of a large checkpoint. So
the training processes, its children, get a SIGUSR1 directly, which torchrun ignores here. Further signals change
nothing, but a second Ctrl-C aborts: it kills all of them.

With `--max_restarts`, torchrun starts the processes again when one of them ends in any way but success; they go on from
the last checkpoint. Two kinds of ends must not be repeated: bad input is therefore refused here, before torchrun, and
after a signal torchrun stands still until the training processes have ended, and is then ended.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError, completion, exit_with_problems, non_negative_int, positive_int
from peft_pretraining.launching import recipe
from peft_pretraining.report import state_size
from peft_pretraining.runtime.processes import set_death_signal
from peft_pretraining.runtime.signals import EXIT_ABORTED, EXIT_REQUEUE, SIGNALS

GRACE_SECONDS = "120"  # torchrun's own 30 s are short for a checkpoint of several billion weights
SECONDS_TO_START = 2.0  # that a request to stop waits for torchrun to have training processes
SECONDS_TO_END = 5.0  # that torchrun may take to end by itself when all training processes have
NOT_PUBLISHED = "no rates of {method} are published at {size}: configs/recipes/{method}.yaml says what is taken instead"


def main(argv: Sequence[str] | None = None, prog: str = "scripts/pretrain.sh") -> int:
    parser = _parser(prog)
    completion.offer(parser, {"size": recipe.known_sizes(), "method": recipe.known_methods()})
    arguments, overrides = parser.parse_known_args(argv)
    size, method = arguments.size.lower(), arguments.method
    try:
        recipe.check_names(size, method)
        _refuse_training_config(overrides)
        processes = _number("nproc", arguments.nproc) if arguments.nproc else max(1, visible_gpus())
        restarts = _number("max_restarts", arguments.max_restarts, non_negative_int)
        nodes = _number("nnodes", arguments.nnodes)
        devices = recipe.Devices(processes, nodes, arguments.rdzv_endpoint, restarts)
        command = recipe.command(size, method, devices, overrides)
        print(shlex.join(command), flush=True)
        if not recipe.is_published(size, method):
            print(f"note: {NOT_PUBLISHED.format(method=method, size=size)}", file=sys.stderr)
        if arguments.dry_run:
            say_state(command, devices)
            return 0
        check_flags(command, devices)
    except ConfigError as error:
        return exit_with_problems(error)
    return run(command, processes)


def check_flags(command: Sequence[str], devices: recipe.Devices) -> None:
    """ConfigError for what torchrun_main.py would refuse: torchrun would show it once more for every restart."""
    cli.load(command[command.index(str(recipe.TRAINER)) + 1 :], {"WORLD_SIZE": str(devices.world_size)})


def say_state(command: Sequence[str], devices: recipe.Devices) -> None:
    """What the optimizer will keep, beside the command, which goes to standard output alone. Nothing where flags are
    missing or wrong, which a run would say."""
    with contextlib.suppress(ConfigError):
        flags, environ = command[command.index(str(recipe.TRAINER)) + 1 :], {"WORLD_SIZE": str(devices.world_size)}
        launch = cli.load(flags, environ, here=False)
        if launch.facts.model is not None:
            print(state_size.line(launch.config, launch.facts.model), file=sys.stderr)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pre-train by a recipe: prints the torchrun command and runs it. All other flags are passed on to "
        "torchrun_main.py after the recipe's and win over them; --dataset_path DIR is the one that a run needs.",
        allow_abbrev=False,
    )
    parser.add_argument("size", help=", ".join(recipe.known_sizes()))
    parser.add_argument("method", help=", ".join(recipe.known_methods()))
    parser.add_argument(
        "--dry_run", action="store_true", help="print the command, and how large the optimizer's state is"
    )
    parser.add_argument("--nproc", metavar="N", help="processes per node (default: the number of GPUs found, else 1)")
    parser.add_argument("--nnodes", metavar="N", default="1", help="nodes (default: 1)")
    parser.add_argument("--rdzv_endpoint", metavar="HOST:PORT", help="where the nodes meet; unused with one node")
    parser.add_argument(
        "--max_restarts",
        metavar="N",
        default="0",
        help="start all processes again up to N times when one was lost or failed; they go on from the last checkpoint "
        "(default: 0)",
    )
    return parser


def _number(name: str, text: str, convert: Callable[[str], int] = positive_int) -> int:
    try:
        return convert(text)
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


def run(command: Sequence[str], processes: int) -> int:
    """Run torchrun to its end, passing signals on; its exit code (128 + n if signal n killed it).

    75 if a signal came and the run is not finished, 130 after a second Ctrl-C. `processes` is how many torchrun starts
    on this node.
    """
    if shutil.which(command[0]) is None:
        return exit_with_problems(ConfigError([f"{command[0]} not found: install torch for {sys.executable}"]))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_SECONDS)
    # A store that torchrun keeps for all starts has addresses of dead processes in it.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    begun = threading.Event()
    interrupts: list[int] = []

    def answer(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            interrupts.append(number)
        if len(interrupts) > 1 and begun.is_set():
            for pid in (*children(torchrun.pid), torchrun.pid):
                _send(pid, signal.SIGKILL)
        asked.set()

    asked = threading.Event()
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it stays ignored
            signal.signal(number, answer)
    # In a session of its own: a signal to this process's group (Ctrl-C, Slurm) does not reach it.
    torchrun = subprocess.Popen(command, start_new_session=True, preexec_fn=_begin_torchrun)
    begun.set()
    threading.Thread(target=_save_and_stop, args=[torchrun, processes, asked], daemon=True).start()
    code = torchrun.wait()
    if len(interrupts) > 1:
        print("aborted: Ctrl-C came again; the newest complete checkpoint is as it was", file=sys.stderr)
        return EXIT_ABORTED
    if code and asked.is_set():
        return EXIT_REQUEUE
    return code if code >= 0 else 128 - code


def _begin_torchrun() -> None:
    """Before the program: it ends, and ends its processes, when this one is killed. SIGUSR1, which it would die of, is
    ignored until the training processes answer it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        set_death_signal(signal.SIGTERM)


def _save_and_stop(torchrun: subprocess.Popen[bytes], processes: int, asked: threading.Event) -> None:
    """Once asked: SIGUSR1 to the training processes; when they have ended, SIGTERM to torchrun.

    Meanwhile torchrun is stopped: it would start new ones as soon as they have ended.
    """
    asked.wait()
    end = time.monotonic() + SECONDS_TO_START
    while torchrun.poll() is None and not _stop_with(torchrun.pid, processes):
        if time.monotonic() > end and not children(torchrun.pid):
            break  # it has not come to starting any, or waits for other nodes
        time.sleep(0.1)
    while living := [pid for pid, code in children(torchrun.pid).items() if code is None]:
        for pid in living:  # again and again: one that has just begun ignores it
            _send(pid, signal.SIGUSR1)
        time.sleep(0.2)
    if any(children(torchrun.pid).values()):
        _send(torchrun.pid, signal.SIGTERM)
    _send(torchrun.pid, signal.SIGCONT)
    end = time.monotonic() + SECONDS_TO_END  # a finished run ends by itself; otherwise it may wait for other nodes
    while torchrun.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if torchrun.poll() is None:
        _send(torchrun.pid, signal.SIGTERM)


def _stop_with(torchrun: int, processes: int) -> bool:
    """Stop torchrun if it has all of its training processes: one alone would wait for the others for ever."""
    _send(torchrun, signal.SIGSTOP)
    if len(children(torchrun)) >= processes:
        return True
    _send(torchrun, signal.SIGCONT)
    return False


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended meanwhile
        pass


def children(parent: int) -> dict[int, int | None]:
    """Processes that `parent` started and has not waited for (Linux): the exit status of those that have ended, 0 for
    success, None for those that run."""
    found: dict[int, int | None] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ... exit_code", proc(5): the name may contain spaces and parentheses
            state, its_parent, *fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(its_parent) == parent:
            found[int(stat.parent.name)] = int(fields[47]) if state == "Z" else None
    return found


if __name__ == "__main__":
    sys.exit(main())
