"""Saving and restoring a run.

    model_{update}/
      config.json, model.safetensors, tokenizer files   a plain Hugging Face LLaMA
      training_state.json                               counters, and the method's small numbers
      training_state/                                   training weights and optimizer state
                                                        (torch.distributed.checkpoint, tensors only)
      manifest.json                                     size and SHA-256 of every file above

A checkpoint is written as `model_{update}.tmp`, flushed, and renamed; a crash at any moment leaves the ones before it.
Tensors are restored in place, so that dtypes and memory alignment (and with them the last bit of a product) stay equal.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim import Optimizer

from peft_pretraining import run_dir
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.distributed.gathering import gather_to_main
from peft_pretraining.methods.base import TrainingMethod


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
    saved_step: int | None = None
    """Update of the last checkpoint that this process wrote or restored."""
    _damaged: set[int] | None = None
    """Updates of checkpoints that lay in the folder but were passed over when the run was resumed."""

    def save_once(self, state: TrainState) -> None:
        """`save`, unless there is a checkpoint of this update already."""
        if self.saved_step != state.update_step:
            self.save(state)

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of the present state; older ones beyond `keep` go only when it is complete."""
        final = self.save_dir / f"model_{state.update_step}"
        temporary = final.with_name(final.name + ".tmp")
        if self.group.is_main:
            if self._damaged is None:
                resumed_from = -1 if self.saved_step is None else self.saved_step
                present = (step for step, _ in run_dir.completed_checkpoints(self.save_dir))
                self._damaged = {step for step in present if step > resumed_from}
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.group.barrier()
        tensors = self._tensors()
        with quietly():
            dcp.save(tensors, checkpoint_id=temporary / run_dir.TENSORS_DIR, no_dist=self.group.world_size == 1)
        self._export(temporary)
        if self.group.is_main:
            counters = {**asdict(state), "world_size": self.group.world_size, "method": self.method.state_dict()}
            (temporary / run_dir.STATE_FILE).write_text(json.dumps(counters, indent=2) + "\n")
            _complete(temporary, final)
            self._delete_old(state.update_step)
        self.group.barrier()
        self.saved_step = state.update_step
        return final

    def restore(self, folder: Path) -> TrainState:
        """Load everything, in place. The folder is known to be undamaged."""
        tensors = self._tensors()
        with quietly():
            dcp.load(tensors, checkpoint_id=folder / run_dir.TENSORS_DIR, no_dist=self.group.world_size == 1)
        counters = run_dir.read_state(folder)
        self.method.load_state_dict(counters["method"])
        known = {name for name in TrainState.__dataclass_fields__ if name in counters}  # an older run has fewer
        state = TrainState(**{name: counters[name] for name in known})
        self.saved_step = state.update_step
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

    def _export(self, folder: Path) -> None:
        """The plain LLaMA, as `AutoModelForCausalLM.from_pretrained` reads it. The main process writes."""
        weights = gather_to_main(self.method.merged_state_dict(self.model), self.group.is_main)
        if self.group.is_main:
            self.model.save_pretrained(folder, state_dict=weights)
            self.save_tokenizer(folder)

    def _delete_old(self, newest: int) -> None:
        """Delete what a complete checkpoint of update `newest` makes superfluous."""
        assert self._damaged is not None
        self._damaged.discard(newest)  # written anew
        if self.keep is None:
            return
        # Damaged ones must not push out good ones. Those with a later number are written over when the run gets there.
        steps = [entry for entry in run_dir.completed_checkpoints(self.save_dir) if entry[0] <= newest]
        good = [folder for step, folder in steps if step not in self._damaged]
        bad = [folder for step, folder in steps if step in self._damaged]
        for folder in (*good[self.keep :], *bad):
            shutil.rmtree(folder)


def _complete(temporary: Path, final: Path) -> None:
    """Flush every file, write the manifest, and give the checkpoint its name."""
    files = {}
    mode = (temporary / run_dir.STATE_FILE).stat().st_mode & 0o777
    for name in run_dir.checkpoint_files(temporary):
        (temporary / name).chmod(mode)  # safetensors' files are private to their owner, whatever the umask says
        _flush(temporary / name)
        files[name] = run_dir.file_digest(temporary / name)
    run_dir.write_atomically(temporary / run_dir.MANIFEST_FILE, json.dumps({"files": files}, indent=2) + "\n")
    for folder in (temporary / run_dir.TENSORS_DIR, temporary):
        run_dir.sync_folder(folder)
    replaced = final.with_name(final.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # damaged, or the run would have been resumed from it
        final.rename(replaced)
    temporary.rename(final)
    run_dir.sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warning that a single process needs no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
