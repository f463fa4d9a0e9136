"""Interrupt a run at random moments, launch the same command again each time, and compare with an undisturbed run.

    python tests/kill_and_resume.py --kills 10 --seed 1 --method galore
    python tests/kill_and_resume.py --kills 60 --layout fsdp --moments start resume training save async_save evaluation
    python tests/kill_and_resume.py --kills 20 --fine_tuning

Real processes train a tiny model: one, or two under torchrun (`--layout ddp` or `fsdp`). Every interruption is
`kill -9` of the launcher, of one rank, or of all, in turn; `--in_save` of them, or more by chance, hit the run while it
writes a checkpoint, and `--moments` takes them in turn instead. `--stops` more are SIGTERM, SIGUSR1, SIGHUP and SIGINT
in turn, after which a single process must exit with 75. Nothing may be left of a launch before the next.

In the end weights, exported weights and optimizer state must equal those of the undisturbed run bit for bit, and
`metrics.jsonl` must have every update and every evaluation once, with equal losses (of a fine-tuning: its weights and
results). Prints one line per interruption, a table of them, and a verdict; exit code 0 if all is well, 1 if not.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import finetune_helpers
import helpers
import interrupting
from conftest import write_blocks, write_model
from interrupting import MOMENTS, PATIENCE, SIGNAL_NAMES, TARGETS, FineTuning, Interruption, Launched, PreTraining

_ATTEMPTS = 3  # at hitting a moment
_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_EVAL_EVERY = 50


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.work_dir or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run = _FineTuningRun(folder, options) if options.fine_tuning else _PreTrainingRun(folder, options)
        undisturbed = Launched.begin(run.command(run.undisturbed), run.undisturbed, folder / "undisturbed.log")
        if (code := undisturbed.process.wait(PATIENCE)) != 0:
            print(f"FAILED: the undisturbed run exited with {code}\n{undisturbed.said()}")
            return 1
        table: collections.Counter[tuple[str, str, str]] = collections.Counter()
        try:
            _interrupted(run, folder, options, table)
            run.assert_same()
        except AssertionError as error:
            print(f"FAILED: {error}")
            return 1
    for (moment, target, name), count in sorted(table.items()):
        print(f"| {options.layout} | {moment} | {name} of {target} | {count} |")
    print(
        f"PASSED: after {options.kills} kills and {options.stops} stops, {run.described} end with the same bits, and "
        "each is recorded once"
    )
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=10, help="kill -9 this many times")
    parser.add_argument("--in_save", type=int, default=None, help="so many of them while saving (default: a third)")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, help="take these in turn, whatever --in_save says")
    parser.add_argument("--stops", type=int, default=0, help="ask to stop, by each signal in turn, this many times")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--layout", default="single", choices=["single", "ddp", "fsdp"])
    parser.add_argument("--fine_tuning", action="store_true", help="run_glue.py on a tiny BERT, by one process")
    parser.add_argument("--method", default="galore")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--updates", type=int, help="length of the run (default: 20 an interruption, at least 200)")
    parser.add_argument("--save_every", type=int, default=16)
    parser.add_argument("--async_save", action="store_true", help="write checkpoints beside the training")
    parser.add_argument("--work_dir", help="keep everything in this folder (default: a temporary one)")
    options = parser.parse_args(argv)
    if options.in_save is None:
        options.in_save = -(-options.kills // 3)
    if options.updates is None:
        options.updates = max(200, 20 * (options.kills + options.stops))
    if options.fine_tuning:
        options.layout = "single"
    return options


class _PreTrainingRun:
    """The command, and what it must end in."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.undisturbed, self.interrupted = folder / "undisturbed", folder / "interrupted"
        self.progress = PreTraining(self.interrupted, _EVAL_EVERY)
        self.described = f"{options.updates} updates of {options.method} ({options.layout})"
        self._options = options
        data, model = write_blocks(folder / "data", validation=100), write_model(folder / "llama.json")
        self._settings = {
            **{"model_config": model, "dataset_path": data, "eval_tokens": 100 * 64},
            **{"batch_size": 4, "total_batch_size": 8, "lr": 1e-2, "warmup_steps": 10, "workers": 1},
            **{"num_training_steps": options.updates, "save_every": options.save_every, "eval_every": _EVAL_EVERY},
            **{"method": options.method, "precision": options.precision, "keep_checkpoints": 3, "autoresume": True},
            **({"distributed_type": options.layout} if options.layout != "single" else {}),
            **({} if options.method == "full_rank" else {"rank": 4, "update_proj_gap": 10}),
        }

    def command(self, save_dir: Path, moment: str = "") -> list[str]:
        settings = {**self._settings, "save_dir": save_dir}
        if moment == "async_save" or (self._options.async_save and moment != "save"):
            settings["async_save"] = True
        words = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return interrupting.command_for("torchrun_main.py", self._options.layout, words)

    def state(self) -> str:
        saving = helpers.unfinished(self.interrupted)
        return (
            f"{'during the save of ' + ', '.join(saving) if saving else 'not during a save'}; "
            f"newest checkpoint {max(self.progress.checkpoints(), default='none')}"
        )

    def assert_saved(self) -> None:
        update = self.progress.done()
        assert not helpers.unfinished(self.interrupted) and self.progress.checkpoints()[-1] == update, (
            "a stop must save its last update"
        )

    def assert_same(self) -> None:
        helpers.assert_same_run(self.interrupted, self.undisturbed)


class _FineTuningRun:
    """As above, with `run_glue.py`."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.undisturbed, self.interrupted = folder / "undisturbed", folder / "interrupted"
        self.progress = FineTuning(self.interrupted)
        self.described = f"{options.updates} updates of a fine-tuning by {options.method}"
        rows = finetune_helpers.rows("sst2", 60, seed=1)
        self._flags = {
            **{"model_name_or_path": finetune_helpers.write_bert(folder / "bert"), "task_name": "sst2"},
            **{"train_file": finetune_helpers.write_rows(folder / "train.jsonl", rows), "max_length": 24},
            **{"validation_file": finetune_helpers.write_rows(folder / "validation.jsonl", rows[:16])},
            **{"do_train": True, "do_eval": True, "max_steps": options.updates, "per_device_train_batch_size": 4},
            **{"save_strategy": "steps", "save_steps": options.save_every, "save_total_limit": 3, "use_cpu": True},
            **{"disable_tqdm": True, "logging_steps": 50, "learning_rate": 1e-3, "method": options.method},
            **({} if options.method == "full_rank" else {"rank": 4, "update_proj_gap": 10}),
        }

    def command(self, output_dir: Path, moment: str = "") -> list[str]:
        words = finetune_helpers.glue_flags(**self._flags, output_dir=output_dir)
        return interrupting.command_for("run_glue.py", "single", words)

    def state(self) -> str:
        return f"newest checkpoint {max(self.progress.checkpoints(), default='none')}"

    def assert_saved(self) -> None:
        assert self.progress.checkpoints(), "a stop must save its last update"

    def assert_same(self) -> None:
        one, other = (folder / "model.safetensors" for folder in (self.interrupted, self.undisturbed))
        assert one.read_bytes() == other.read_bytes(), "the weights differ"
        one, other = (json.loads((f / "all_results.json").read_text()) for f in (self.interrupted, self.undisturbed))
        for name in ("train_steps", "eval_accuracy", "eval_loss"):
            assert one[name] == other[name], f"{name}: {one[name]} instead of {other[name]}"


def _plan(options: argparse.Namespace, rng: random.Random) -> list[Interruption]:
    """What to do to each launch in turn."""
    moments = ["save" if index < options.in_save else "training" for index in range(options.kills)]
    if options.moments:
        moments = [options.moments[index % len(options.moments)] for index in range(options.kills)]
    targets = ["launcher"] if options.layout == "single" else TARGETS
    kinds = [
        (moment, targets[index // len(options.moments or [0]) % len(targets)], signal.SIGKILL)
        for index, moment in enumerate(moments)
    ]
    kinds += [("training", "launcher", _STOPS[index % len(_STOPS)]) for index in range(options.stops)]
    rng.shuffle(kinds)
    room = options.updates - _ATTEMPTS * options.save_every  # the last must not come after the run's end
    most = max(1, room // len(kinds) - options.save_every // 2)
    return [Interruption(*kind, updates=rng.randint(1, most)) for kind in kinds]


def _interrupted(run, folder: Path, options: argparse.Namespace, table: collections.Counter) -> None:
    rng = random.Random(options.seed)
    log = folder / "interrupted.log"
    for number, interruption in enumerate(_plan(options, rng), 1):
        for _ in range(_ATTEMPTS):
            hit = _interrupt(run, interruption, number, log, options, rng)
            kind = "kill" if interruption.signal == signal.SIGKILL else "stop"
            table[interruption.moment if hit else "training", interruption.target, kind] += 1
            if hit or interruption.moment not in ("save", "async_save"):
                break
    launched = Launched.begin(run.command(run.interrupted), run.interrupted, log)
    code, _ = launched.end()
    assert code == 0, f"the last launch exited with {code}\n{launched.said()}"


def _interrupt(
    run, interruption: Interruption, number: int, log: Path, options: argparse.Namespace, rng: random.Random
) -> bool:
    """One launch and its end; whether the moment was hit."""
    began = time.monotonic()
    launched = Launched.begin(run.command(run.interrupted, interruption.moment), run.interrupted, log)
    try:
        hit, update = interrupting.interrupt(launched, interruption, run.progress, rng)
        seconds = time.monotonic() - began
        code, left = launched.end()
    finally:
        launched.kill()
    missed = "" if hit else " (missed)"
    print(
        f"{number}: {_name(interruption)} of {interruption.target} at {interruption.moment}{missed}, "
        f"{seconds:.2f} s after the launch, update {update}, {run.state()}; all gone after {left:.1f} s",
        flush=True,
    )
    if interruption.signal == signal.SIGKILL:
        assert code != 0, f"exit code 0 after a kill\n{launched.said()}"
    elif options.layout == "single":
        assert code == helpers.REQUEUE, f"exit code {code} instead of {helpers.REQUEUE}\n{launched.said()}"
        run.assert_saved()
    return hit


def _name(interruption: Interruption) -> str:
    return SIGNAL_NAMES[interruption.signal]


if __name__ == "__main__":
    sys.exit(main())
