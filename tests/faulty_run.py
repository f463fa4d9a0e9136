"""`torchrun_main.py` with faults in it, for torchrun: `faulty_run.py FAULTS.json FLAGS...`.

FAULTS.json may have "hang": [rank, update], whose data loader then hangs, once; "bad": updates whose batches are
noise; "crash": an update that raises an error; "crash_in_save": a rank that raises one, and "hang_in_save": a rank that
hangs, before the first collective of a save; "digests": a folder in which each rank leaves the SHA-256 of its weights
and its counters at the end. Statistics of spikes count from the tenth update on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
from test_spikes import bad_batches

from peft_pretraining.checkpoint import checkpointer
from peft_pretraining.data import blocks
from peft_pretraining.runtime.signals import run_script
from peft_pretraining.training import build, spikes

_MARK = 10**9  # above any sample's index: the number of the update, passed on to the data loader's worker


def hang_once(update: int, per_update: int, marker: Path) -> None:
    """Reading any sample of 0-based `update` never ends, unless the marker says that it has happened."""
    sampler, read = blocks.MicroBatchSampler.__iter__, blocks.TokenBlocks.__getitems__

    def watched(self):
        position = self.start
        for batch in sampler(self):
            yield [*batch, _MARK + position // per_update]
            position += self.batch_size * self.group.world_size

    def hanging_data_loader(self, indices):
        if indices[-1] >= _MARK:  # evaluation batches have none
            *indices, now = indices
            if now - _MARK == update and not marker.exists():
                marker.touch()
                time.sleep(3600)
        return read(self, indices)

    blocks.MicroBatchSampler.__iter__, blocks.TokenBlocks.__getitems__ = watched, hanging_data_loader


def leave_digests(folder: Path, rank: int) -> None:
    train = build.train

    def observed(run):
        code = train(run)
        digest = hashlib.sha256()
        for param in run.model.parameters():
            digest.update(param.detach().contiguous().numpy().tobytes())
        counters = {**dataclasses.asdict(run.state), "digest": digest.hexdigest()}
        (folder / f"rank{rank}.json").write_text(json.dumps(counters))
        return code

    build.train = observed


def fail_in_save(act: Callable[[], Any]) -> None:
    def failing(self, state):
        act()

    checkpointer.Checkpointer._snapshot = failing


def crash_in(update: int, flags: tuple[str, ...]) -> int:
    with helpers.before_update(update, lambda: 1 / 0):
        return helpers.run(flags)


def main(faults_file: str, *flags: str) -> int:
    faults, rank = json.loads(Path(faults_file).read_text()), int(os.environ["RANK"])
    spikes.FIRST_UPDATES, spikes.WINDOW = 10, 15
    if faults.get("hang", [None])[0] == rank:
        hang_once(faults["hang"][1], 8, Path(faults_file).with_suffix(".hung"))
    if faults.get("crash_in_save") == rank:
        fail_in_save(lambda: 1 / 0)
    if faults.get("hang_in_save") == rank:
        fail_in_save(lambda: time.sleep(3600))
    if "digests" in faults:
        leave_digests(Path(faults["digests"]), rank)
    if "crash" in faults:
        return crash_in(faults["crash"], flags)
    with bad_batches(faults.get("bad", ())):
        return helpers.run(flags)


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(*sys.argv[1:])))
