"""Saving and restoring a run.

    model_{update}/
      config.json, model.safetensors, tokenizer files   a plain Hugging Face LLaMA
      training_state.json                               counters, and the method's small numbers
      training_state/                                   training weights and optimizer state
                                                        (torch.distributed.checkpoint, tensors only)
      manifest.json                                     size and SHA-256 of every file above

A checkpoint is written as `model_{update}.tmp`, flushed, and renamed (checkpoint_writer.py); a crash at any moment or a
full disk leaves the ones before it. A save that fails does not end the run, unless it is the last one.
Tensors are restored in place, so that dtypes and memory alignment (and with them the last bit of a product) stay equal.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peft_pretraining import run_dir
from peft_pretraining.checkpoint_writer import Background, NotSaved, Snapshot, Writer
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.distributed.gathering import gather_to_main
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.safe_loading import load_tensors

log = logging.getLogger("peft_pretraining")

_ONE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"  # of torch.distributed.checkpoint
_SECONDS_TO_RETRY = 2.0


class SaveFailed(RuntimeError):
    """The state that a run ends with could not be saved; all ranks raise it."""


@dataclass
class TrainState:
    """The counters of a run: everything that changes from update to update and is not a tensor."""

    update_step: int = 0
    """Updates done, skipped ones included."""
    tokens_seen: int = 0
    """Tokens read for training, over all ranks."""
    data_position: int = 0
    """Samples taken from the stream."""
    data_state: dict[str, Any] = field(default_factory=dict)
    """What the data needs besides to be read on there: small numbers, as JSON has them."""
    skipped_updates: int = 0
    schedule_start: int = 0
    """Update at which the schedule began: that of the checkpoint behind a warm start, otherwise 0."""
    evaluated_step: int = -1
    """Last update that was evaluated."""
    skipped_spikes: int = 0
    """Updates skipped for a spike; `skipped_updates` are those that were not finite."""
    spikes_in_a_row: int = 0
    """Of these, how many came just before."""
    spike_statistics: dict[str, Any] = field(default_factory=dict)
    """Running statistics of `spikes.observe`."""


@dataclass
class Checkpointer:
    """Writes the checkpoints of one run, and restores them."""

    save_dir: Path
    group: ProcessGroup
    model: nn.Module
    """The training model, not wrapped."""
    optimizer: Optimizer
    method: TrainingMethod
    save_tokenizer: Callable[[Path], None]
    """Writes the tokenizer's files into a folder."""
    keep: int | None = None
    """How many checkpoints to keep; None keeps all."""
    asynchronous: bool = False
    """Let training go on while a checkpoint is written."""
    saved_step: int | None = None
    """Update of the last checkpoint that this process wrote or restored."""
    failed_saves: int = 0
    """Attempts of this process that did not end in a checkpoint."""
    _damaged: set[int] = field(init=False)
    """Updates of checkpoints that lay in the folder but were passed over when the run was resumed."""

    def __post_init__(self) -> None:
        self._writer = Writer(self.group.companion(), self._export)
        self._background = Background()
        self._damaged = (
            {step for step, _ in run_dir.completed_checkpoints(self.save_dir)} if self.group.is_main else set()
        )
        # For good: a thread that restored the filters would disturb those of the others.
        warnings.filterwarnings("ignore", message=_ONE_PROCESS)

    def save_once(self, state: TrainState, next_save: int) -> None:
        """`save`, unless there is a checkpoint of this update already; a failure is made up for at `next_save`.

        Waits for the save before this one; if asynchronous, not for this one.
        """
        self.wait()
        if self.saved_step != state.update_step:
            self.save(state, f"the run goes on, and saves again at update {next_save}", self.asynchronous)

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
        this returns.
        """
        snapshot = self._snapshot(state)
        if beside:
            self._background.start(functools.partial(self._write, snapshot.copied(), state.update_step, consequence))
        else:
            self._write(snapshot, state.update_step, consequence)

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
        try:
            self._writer.write(snapshot, self.save_dir / f"model_{step}")
        except NotSaved as error:
            self.failed_saves += 1
            if self.group.is_main:
                log.error("update %d was not saved (%s); %s", step, error, consequence)
            return
        self.saved_step = step
        if self.group.is_main:
            try:
                self._delete_old(step)
            except OSError as error:
                log.warning("an old checkpoint could not be deleted (%s)", error)

    def restore(self, folder: Path) -> TrainState:
        """Load everything, in place. The folder is known to be undamaged; `ValueError` if it cannot be loaded still."""
        tensors = self._tensors()
        load_tensors(tensors, folder / run_dir.TENSORS_DIR, distributed=self.group.world_size > 1)
        counters = run_dir.read_state(folder)
        self.method.load_state_dict(counters["method"])
        known = {name for name in TrainState.__dataclass_fields__ if name in counters}  # an older run has fewer
        state = TrainState(**{name: counters[name] for name in known})
        self.saved_step = state.update_step
        self._damaged = {step for step in self._damaged if step > state.update_step}
        return state

    def _tensors(self) -> dict[str, Any]:
        """Training weights and optimizer state by name: tensors only, so that nothing is pickled."""
        names = {param: name for name, param in self.model.named_parameters()}
        optimizer = {
            f"{names[param]}.{key}": value
            for param, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        return {"model": self.model.state_dict(), "optimizer": optimizer}

    def _snapshot(self, state: TrainState) -> Snapshot:
        """What a checkpoint of the present state holds, for the most part in the memory that training uses."""
        exported = gather_to_main(self.method.merged_state_dict(self.model), self.group.is_main)
        counters = {**asdict(state), "world_size": self.group.world_size, "method": self.method.state_dict()}
        return Snapshot(self._tensors(), exported, counters)

    def _export(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """The plain LLaMA, as `AutoModelForCausalLM.from_pretrained` reads it."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.save_tokenizer(folder)

    def _delete_old(self, newest: int) -> None:
        """Delete what a complete checkpoint of update `newest` makes superfluous."""
        self._damaged.discard(newest)  # written anew
        if self.keep is None:
            return
        # Damaged ones must not push out good ones. Those with a later number are written over when the run gets there.
        steps = [entry for entry in run_dir.completed_checkpoints(self.save_dir) if entry[0] <= newest]
        good = [folder for step, folder in steps if step not in self._damaged]
        bad = [folder for step, folder in steps if step in self._damaged]
        for folder in (*good[self.keep :], *bad):
            shutil.rmtree(folder)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warning that a single process needs no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ONE_PROCESS)
        yield


def starting_counters(folder: Path) -> TrainState:
    """The counters of a warm start: updates and tokens go on, everything else begins afresh."""
    path = folder / run_dir.STATE_FILE
    counters = json.loads(path.read_text()) if path.is_file() else {}  # older code bases write the same two names
    step = int(counters.get("update_step", 0))
    return TrainState(
        update_step=step,
        tokens_seen=int(counters.get("tokens_seen", 0)),
        data_position=int(counters.get("data_position", 0)),
        data_state=dict(counters.get("data_state", {})),
        schedule_start=step,
    )


def versions() -> dict[str, str]:
    import platform

    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
