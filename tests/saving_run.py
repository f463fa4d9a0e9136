"""Runs whose saves are slow, or find the disk full: `saving_run.py CASES.json`, by itself or under torchrun.

A case is {"argv": [...]}, and may have "no_room": [rank, first, last], that rank's files having no more than a few
hundred bytes from 0-based update `first` until `last` begins (null: to the end); "room_at_retry": true, which ends that
when the last save is tried again; "slow": [update, seconds], the time that giving that update's checkpoint its name
takes; "signal": an update within which rank 0 gets a SIGUSR1; "spoil": one at which weights turn NaN, once; "damage":
[folder, file], a finished run's folder that is copied to that of this run, and a file of it in which a bit is flipped.

Beside CASES.json, `rank{N}.json` gets a list of {"exit_code", "failed_saves", "seen", "digest"}, one per case: "seen"
are the complete checkpoints at each attempt to complete one, "digest" the SHA-256 of this rank's parts of the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import helpers
import torch.distributed as dist

from peft_pretraining.checkpoint import checkpointer, writer
from peft_pretraining.distributed.sharding import local
from peft_pretraining.training import build
from peft_pretraining.training import loop as train

ROOM = 300
"""Bytes, about one record of `metrics.jsonl`. Python ignores SIGXFSZ: a write beyond them fails with EFBIG."""


def give_room(size: int = resource.RLIM_INFINITY) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def no_room(first: int, last: int | None, room_at_retry: bool) -> Iterator[None]:
    train_step, sleep = train.train_step, time.sleep

    def watched(run, micro_batches, stop):
        if run.state.update_step in (first, last):
            run.checkpointer.wait()  # which save it hits must not be left to chance
            give_room(ROOM if run.state.update_step == first else resource.RLIM_INFINITY)
        return train_step(run, micro_batches, stop)

    train.train_step = watched
    if room_at_retry:
        checkpointer.time.sleep = lambda seconds: give_room()
    try:
        yield
    finally:
        train.train_step, checkpointer.time.sleep = train_step, sleep
        give_room()


@contextlib.contextmanager
def watched_completion(seen: list[list[int]], slow: tuple[int, float] | None) -> Iterator[None]:
    complete = writer.complete

    def watched(temporary, final, files):
        seen.append(helpers.checkpoints(final.parent))
        if slow is not None and final.name == f"model_{slow[0]}":
            time.sleep(slow[1])
        complete(temporary, final, files)

    writer.complete = watched
    try:
        yield
    finally:
        writer.complete = complete


def run_case(case: dict, rank: int) -> dict:
    result = {"seen": []}
    train_ = build.train

    def observed(run):
        try:
            return train_(run)
        finally:
            parts = [local(param.detach()) for param in run.model.parameters()]
            result["digest"] = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
            result["failed_saves"] = run.checkpointer.failed_saves

    build.train = observed
    if "damage" in case and rank == 0:
        copy = shutil.copytree(case["damage"][0], case["argv"][-1])
        helpers.flip_byte(Path(copy) / case["damage"][1])
    with contextlib.ExitStack() as faults:
        faults.callback(setattr, build, "train", train_)
        faults.enter_context(watched_completion(result["seen"], case.get("slow")))
        if case.get("no_room", [None])[0] == rank:
            faults.enter_context(no_room(*case["no_room"][1:], case.get("room_at_retry", False)))
        if "spoil" in case:
            faults.enter_context(helpers.spoil_weights(case["spoil"]))
        if "signal" in case and rank == 0:
            faults.enter_context(helpers.signal_in_update(case["signal"], signal.SIGUSR1))
        if rank == 0:  # which speaks for all; the others may be at the next run already
            print(f"case {case['argv'][-1]}", file=sys.stderr)
        result["exit_code"] = helpers.run(case["argv"])
    return result


def main(cases_file: str) -> None:
    # One group for all runs: a second one would find the first one's addresses in torchrun's store.
    init, destroy = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = lambda *args, **settings: None if dist.is_initialized() else init(*args, **settings)
    dist.destroy_process_group = lambda: None
    checkpointer._SECONDS_TO_RETRY = 0.1
    path, rank = Path(cases_file), int(os.environ.get("RANK", "0"))
    results = [run_case(case, rank) for case in json.loads(path.read_text())]
    if dist.is_initialized():
        destroy()
    (path.parent / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
