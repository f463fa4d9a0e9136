"""Saving and restoring a run.

    model_{update}/
      config.json, model.safetensors, tokenizer files   a plain Hugging Face LLaMA
      training_state.json                               counters, the method's small numbers, run id, settings, format
      training_state/                                   training weights and optimizer state
                                                        (torch.distributed.checkpoint, tensors only)
      manifest.json                                     size and SHA-256 of every file above

A checkpoint is written as `model_{update}.tmp`, flushed, and renamed (writer.py); a crash at any moment or a
full disk leaves the ones before it. A save that fails does not end the run, unless it is the last one.
Tensors are restored in place, so that dtypes and memory alignment (and with them the last bit of a product) stay equal.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from transformers import PreTrainedModel

from peft_pretraining.checkpoint import resume, run_dir
from peft_pretraining.checkpoint.contents import ONE_PROCESS, compare, describe, named, without_unsaved_rests
from peft_pretraining.checkpoint.failures import NotFinite, SaveFailed
from peft_pretraining.checkpoint.finite import all_finite, leaves
from peft_pretraining.checkpoint.retention import Retention
from peft_pretraining.checkpoint.safe_loading import load_tensors
from peft_pretraining.checkpoint.staging import HostCopies
from peft_pretraining.checkpoint.train_state import TrainState, read_counters, state_of
from peft_pretraining.checkpoint.writer import Background, NotSaved, Snapshot, Writer, one_line
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.distributed.gathering import gather_to_main, tied_names
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.runtime.watchdog import SAVE_FACTOR, watched

log = logging.getLogger("peft_pretraining")

T = TypeVar("T")

_SECONDS_TO_RETRY = 2.0


class NotRestored(RuntimeError):
    """A checkpoint cannot be loaded into this run; all ranks raise it, with the same reason on one line."""

    def __init__(self, reason: str, undamaged: bool = False) -> None:
        super().__init__(reason)
        self.undamaged = undamaged
        """Whether it is whole, only another run's or that of other settings."""


@dataclass
class Checkpointer:
    """Writes the checkpoints of one run, and restores them."""

    save_dir: Path
    group: ProcessGroup
    model: PreTrainedModel
    """The training model, not wrapped."""
    optimizer: Optimizer
    method: TrainingMethod
    save_tokenizer: Callable[[Path], Any]
    """Writes the tokenizer's files into a folder."""
    record: resume.RunRecord = field(default_factory=resume.RunRecord)
    """What the checkpoints say of their run."""
    keep: int | None = None
    """How many checkpoints to keep; None keeps all."""
    asynchronous: bool = False
    """Let training go on while a checkpoint is written."""
    saved_step: int | None = None
    """Update of the last checkpoint that this process wrote or restored."""
    saved_in: Path | None = None
    """Its folder."""
    failed_saves: int = 0
    """Attempts of this process that did not end in a checkpoint."""

    def __post_init__(self) -> None:
        self.ranks = self.group.checkpoint_group()
        self._writer = Writer(self.ranks, self._export)
        self._background = Background()
        self._copies = HostCopies(self.group.local_world_size)
        self.retention = Retention(self.save_dir, self.keep, self.record.id)
        # For good: a thread that restored the filters would disturb those of the others.
        warnings.filterwarnings("ignore", message=ONE_PROCESS)

    @watched("a save", SAVE_FACTOR)
    def save_once(self, state: TrainState, next_save: int) -> None:
        """`save`, unless there is a checkpoint of this update already; a failure is made up for at `next_save`.

        Waits for the save before this one; if asynchronous, not for this one.
        """
        self.wait()
        if self.saved_step != state.update_step:
            self.save(state, f"the run goes on, and saves again at update {next_save}", self.asynchronous)

    @watched("the last save", SAVE_FACTOR)
    def save_last(self, state: TrainState) -> None:
        """Save what the run ends with, unless that is done. Raises `SaveFailed` if it cannot be done, tried twice."""
        self.wait()
        if self.saved_step != state.update_step:
            self.save(state, f"trying once more in {_SECONDS_TO_RETRY:g} s")
        if self.saved_step != state.update_step:
            time.sleep(_SECONDS_TO_RETRY)
            self.save(state, "giving up")
        if self.saved_step != state.update_step:
            kept = "no checkpoint" if self.saved_step is None else f"checkpoint {self.saved_step}"
            raise SaveFailed(
                f"the last update {state.update_step} could not be saved in {self.save_dir}; there is {kept} to go "
                "on from: make room, and launch the same command again with --autoresume True"
            )

    def save(self, state: TrainState, consequence: str, beside: bool = False) -> None:
        """Try to write a checkpoint of the present state; older ones beyond `keep` go only when it is complete.

        A failure is counted and logged, with its consequence. With `beside` only a copy of the state is made before
        this returns. Raises `NotFinite` for a state from which no run could go on: it would take the place of one from
        which it can.
        """
        if not all_finite(leaves(self._tensors()), self.group):
            raise NotFinite(
                f"after update {state.update_step} weights or optimizer state are not finite, and are not saved"
            )
        snapshot = self._snapshot(state)
        if beside:
            assert not self.in_flight, "what is being written would be overwritten"
            copied = snapshot.copied(self._copies)
            self._background.start(functools.partial(self._write, copied, state.update_step, consequence))
        else:
            self._write(snapshot, state.update_step, consequence)

    def save_rewound(self, state: TrainState, last: int) -> None:
        """Write the state anew that the run has gone back to, with what was skipped; then delete what was undone.

        `last` is the update from which it went back.
        """
        self.saved_step = None
        self.save(state, "the run goes on; stopped before its next checkpoint, it would have to go back again")
        if self.saved_step is not None and self.group.is_main:
            self.retention.delete_after(state.update_step, last)

    def where_to_go_on(self) -> str:
        """What a run that fails says of the checkpoints it leaves."""
        if self.saved_in is None:
            return "there is no checkpoint to go back to"
        if self.saved_in.parent != self.save_dir:
            return f"the checkpoint to go back to is {self.saved_in} (the one of --resume_from)"
        return f"the newest good checkpoint is {self.saved_in}: --autoresume True goes on from it"

    @property
    def in_flight(self) -> bool:
        """Whether this rank is writing a checkpoint beside the training."""
        return self._background.busy

    def wait(self, seconds: float | None = None) -> None:
        """Until no save is in flight, on all ranks; or for so long."""
        if self.in_flight and self.group.is_main:
            log.info("waiting for the checkpoint that is being written")
        self._background.wait(seconds)

    def _write(self, snapshot: Snapshot, step: int, consequence: str) -> None:
        """From here on nothing of the run is read but the snapshot: it may be training."""
        began = time.perf_counter()
        try:
            self._writer.write(snapshot, self.save_dir / f"model_{step}")
        except NotSaved as error:
            self.failed_saves += 1
            if self.group.is_main:
                log.error("update %d was not saved (%s); %s", step, error, consequence)
            return
        self.saved_step, self.saved_in = step, self.save_dir / f"model_{step}"
        if self.group.is_main:
            log.info("saved %s (%.1f s)", self.saved_in, time.perf_counter() - began)
            try:
                self.retention.delete_old(step)
            except OSError as error:
                log.warning("an old checkpoint could not be deleted (%s)", error)

    @watched("reading a checkpoint", SAVE_FACTOR)
    def restore(self, folder: Path) -> TrainState:
        """Load everything, in place. The folder is known to be undamaged; all ranks call this together.

        Raises `NotRestored` when it is of another model or method, or cannot be loaded for any other reason. What has
        been loaded by then stays loaded: another checkpoint must follow, or the run must be built anew.
        """
        described = self._attempt(lambda: describe(folder))
        self._attempt(lambda: self._take_older_forms(described.state_dict_metadata))
        tensors = self._tensors()
        tensors["model"] = without_unsaved_rests(tensors["model"], described)
        names = self._names_on_all_ranks(tensors)
        self._attempt(lambda: compare(described, tensors, names), undamaged=True)
        counters = self._attempt(lambda: read_counters(folder))
        state = self._attempt(lambda: state_of(counters))
        self._attempt(lambda: load_tensors(tensors, folder / run_dir.TENSORS_DIR, distributed=self.group.is_collective))
        self._attempt(lambda: self.method.load_state_dict(counters["method"]))
        if not all_finite(leaves(tensors), self.group):
            raise NotRestored("its weights or optimizer state are not finite")
        self.saved_step, self.saved_in = state.update_step, folder
        return state

    def _take_older_forms(self, saved: Collection[str]) -> None:
        """Let the optimizer hold its state as the checkpoint with the keys `saved` does; torch would not compare."""
        if isinstance(self.optimizer, LowRankOptimizer):
            names: dict[torch.Tensor, str] = {
                param: f"optimizer.{name}" for name, param in self.model.named_parameters()
            }
            self.optimizer.adopt_saved_form(saved, names)

    def _attempt(self, act: Callable[[], T], undamaged: bool = False) -> T:
        """Do one step of loading on all ranks; if it fails on one, all raise `NotRestored`."""
        mine: tuple[T, None] | tuple[None, str]
        try:
            mine = act(), None
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            mine = None, one_line(error)
        reasons = [reason for reason in self.ranks.gather(mine[1]) if reason is not None]
        if mine[1] is None and not reasons:
            return mine[0]
        raise NotRestored(reasons[0], undamaged)

    def _names_on_all_ranks(self, tensors: dict[str, Any]) -> set[str]:
        """Of a dictionary that may hold other tensors on each rank."""
        return set().union(*self.ranks.gather(set(named(tensors))))

    def _tensors(self) -> dict[str, Any]:
        """Training weights and optimizer state by name: tensors only, so that nothing is pickled."""
        names: dict[torch.Tensor, str] = {param: name for name, param in self.model.named_parameters()}
        optimizer = {
            f"{names[param]}.{key}": value
            for param, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        return {"model": self.model.state_dict(), "optimizer": optimizer}

    def _snapshot(self, state: TrainState) -> Snapshot:
        """What a checkpoint of the present state holds, for the most part in the memory that training uses."""
        merged = self.method.merged_state_dict(self.model)
        exported = gather_to_main(merged, self.group.is_main, tied_names(self.model))
        more = {
            "world_size": self.group.world_size,
            "method": self.method.state_dict(),
            "run": self.record.as_json(),
            "versions": versions(),
        }
        return Snapshot(self._tensors(), exported, copy.deepcopy(state), more)

    def _export(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """The plain LLaMA, as `AutoModelForCausalLM.from_pretrained` reads it."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.save_tokenizer(folder)


def versions() -> dict[str, str]:
    import platform

    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
