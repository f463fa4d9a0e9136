"""Interrupt a run at random moments, launch the same command again each time, and compare with an undisturbed run.

    python tests/kill_and_resume.py --kills 10 --seed 1 --method galore

Real processes of `torchrun_main.py` train a tiny model. Most interruptions are `kill -9`; `--in_save` of them, or more
by chance, hit the run while it writes a checkpoint. `--stops` more are SIGTERM or SIGUSR1 in turn, after which the
process must exit with 75. In the end weights, exported weights and optimizer state must equal those of the undisturbed
run bit for bit, and `metrics.jsonl` must have every update and every evaluation once, with equal losses. Prints one
line per interruption and a verdict; exit code 0 if all is well, 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import helpers
from conftest import write_blocks, write_model

_UPDATE_SECONDS = 0.02  # about as long as an update of this model takes
_SAVE_SECONDS = 0.01  # less than writing one of its checkpoints takes
_ATTEMPTS = 3  # at hitting a save
_PATIENCE = 120.0  # seconds that a launch may take


@dataclass(frozen=True)
class Interruption:
    update: int
    """No sooner than when this update has been recorded."""
    signal: int
    in_save: bool
    """Wait for the next checkpoint to be begun."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.work_dir or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        command = _command(folder, options)
        undisturbed = _launch([*command, "--save_dir", str(folder / "undisturbed")], folder / "undisturbed.log")
        if (code := undisturbed.wait(_PATIENCE)) != 0:
            print(f"FAILED: the undisturbed run exited with {code}\n{(folder / 'undisturbed.log').read_text()}")
            return 1
        try:
            _interrupted(command, folder, _plan(options, rng), rng)
            helpers.assert_same_run(folder / "interrupted", folder / "undisturbed")
        except AssertionError as error:
            print(f"FAILED: {error}")
            return 1
    print(
        f"PASSED: after {options.kills} kills and {options.stops} stops, {options.updates} updates of {options.method} "
        "end with the same bits, and each is recorded once"
    )
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=10, help="kill -9 this many times")
    parser.add_argument("--in_save", type=int, default=None, help="so many of them while saving (default: a third)")
    parser.add_argument("--stops", type=int, default=0, help="SIGTERM and SIGUSR1, in turn, this many times")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--method", default="galore")
    parser.add_argument("--updates", type=int, default=400, help="length of the run")
    parser.add_argument("--save_every", type=int, default=16)
    parser.add_argument("--async_save", action="store_true", help="write checkpoints beside the training")
    parser.add_argument("--work_dir", help="keep everything in this folder (default: a temporary one)")
    options = parser.parse_args(argv)
    if options.in_save is None:
        options.in_save = -(-options.kills // 3)
    return options


def _command(folder: Path, options: argparse.Namespace) -> list[str]:
    settings = {
        **{"model_config": write_model(folder / "llama.json"), "dataset_path": write_blocks(folder / "data")},
        **{"batch_size": 4, "total_batch_size": 8, "lr": 1e-2, "warmup_steps": 10, "workers": 1},
        **{"num_training_steps": options.updates, "save_every": options.save_every, "eval_every": 50},
        **{"method": options.method, "keep_checkpoints": 3, "autoresume": True},
        **({"async_save": True} if options.async_save else {}),
        **({} if options.method == "full_rank" else {"rank": 4, "update_proj_gap": 10}),
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def _plan(options: argparse.Namespace, rng: random.Random) -> list[Interruption]:
    """Interruptions in the order of their updates."""
    count = options.kills + options.stops
    moments = sorted(rng.sample(range(1, options.updates - _ATTEMPTS * options.save_every), count))
    kinds = [(signal.SIGKILL, index < options.in_save) for index in range(options.kills)]
    kinds += [((signal.SIGTERM, signal.SIGUSR1)[index % 2], False) for index in range(options.stops)]
    rng.shuffle(kinds)
    return [Interruption(update, *kind) for update, kind in zip(moments, kinds, strict=True)]


def _interrupted(command: list[str], folder: Path, plan: list[Interruption], rng: random.Random) -> None:
    save_dir, log = folder / "interrupted", folder / "interrupted.log"
    command = [*command, "--save_dir", str(save_dir)]
    for number, interruption in enumerate(plan, 1):
        for _ in range(_ATTEMPTS):
            if _interrupt(command, interruption, number, save_dir, log, rng) or not interruption.in_save:
                break
        else:
            raise AssertionError(f"{_ATTEMPTS} kills that were to hit a save came after its end")
    code = _launch(command, log).wait(_PATIENCE)
    assert code == 0, f"the last launch exited with {code}\n{log.read_text()}"


def _interrupt(
    command: list[str], interruption: Interruption, number: int, save_dir: Path, log: Path, rng: random.Random
) -> bool:
    """One launch and its end; whether it came during a save."""
    began = time.monotonic()
    process = _launch(command, log)
    try:
        _wait_for(process, interruption, save_dir, log, began)
        time.sleep(rng.uniform(0, _SAVE_SECONDS if interruption.in_save else _UPDATE_SECONDS))
        os.kill(process.pid, interruption.signal)
        code = process.wait(_PATIENCE)
    finally:
        process.kill()
    update, saving = _last_update(save_dir), helpers.unfinished(save_dir)
    print(
        f"{number}: {signal.Signals(interruption.signal).name} {time.monotonic() - began:.2f} s after the launch, "
        f"update {update}, {'during the save of ' + ', '.join(saving) if saving else 'not during a save'}; "
        f"newest checkpoint {max(helpers.checkpoints(save_dir), default='none')}",
        flush=True,
    )
    expected = -signal.SIGKILL if interruption.signal == signal.SIGKILL else helpers.REQUEUE
    assert code == expected, f"exit code {code} instead of {expected}\n{log.read_text()}"
    if interruption.signal != signal.SIGKILL:
        assert not saving and helpers.checkpoints(save_dir)[-1] == update, "a stop must save its last update"
    return bool(saving)


def _wait_for(process: subprocess.Popen, until: Interruption, save_dir: Path, log: Path, began: float) -> None:
    """Until the update has been recorded and, if asked for, a checkpoint is being written."""
    behind, left_over = True, _unfinished_saves(save_dir)
    while True:
        assert process.poll() is None, f"ended before update {until.update}\n{log.read_text()}"
        assert time.monotonic() - began < _PATIENCE, f"no update {until.update}\n{log.read_text()}"
        if behind:
            behind = _last_update(save_dir) < until.update
        elif not until.in_save or _is_saving(save_dir, left_over):
            return
        time.sleep(0.001)


def _unfinished_saves(save_dir: Path) -> set[int]:
    """Inodes of the folders in which checkpoints were being written."""
    found = set()
    for name in helpers.unfinished(save_dir):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            found.add((save_dir / name).stat().st_ino)
    return found


def _is_saving(save_dir: Path, left_over: set[int]) -> bool:
    """Whether this launch is writing a checkpoint: one that an earlier kill left behind does not count."""
    return bool(_unfinished_saves(save_dir) - left_over)


def _last_update(save_dir: Path) -> int:
    """The last update with a complete line in `metrics.jsonl`, 0 if there is none."""
    path = save_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max((int(line.split(b":")[1].split(b",")[0]) for line in lines[-3:]), default=0)


def _launch(arguments: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, str(helpers.PROJECT / "torchrun_main.py"), *arguments]
    with open(log, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=log.parent, env=helpers.child_environment())


if __name__ == "__main__":
    sys.exit(main())
