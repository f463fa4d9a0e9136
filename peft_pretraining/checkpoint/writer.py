"""Putting one checkpoint on disk, so that either all ranks count it as complete or none does.

The ranks write side by side, each flushes and hashes its own files, and the main process alone gives the folder its
name, when it sees the files of all. They talk over a group of their own, so that training may go on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.staging import HostCopies
from peft_pretraining.checkpoint.train_state import TrainState, write_counters
from peft_pretraining.distributed import CheckpointGroup

T = TypeVar("T")

_SECONDS_TO_APPEAR = 30.0  # a network file system may show other nodes' files late


class NotSaved(RuntimeError):
    """A checkpoint was not completed, on any rank; the message is one line with the reason."""


@dataclass
class Snapshot:
    """What a checkpoint holds."""

    tensors: dict[str, Any]
    """Training state as torch.distributed.checkpoint takes it: this rank's parts."""
    exported: dict[str, Tensor]
    """Whole weights of the plain LLaMA on the main process, nothing on the others."""
    state: TrainState
    more: dict[str, Any]
    """What else belongs into `training_state.json`."""

    def copied(self, copies: HostCopies) -> Snapshot:
        """One that training does not change, until the next is made."""
        copy = copies.copy({"tensors": self.tensors, "exported": self.exported})
        return Snapshot(copy["tensors"], copy["exported"], self.state, self.more)


@dataclass(frozen=True)
class Writer:
    """Writes snapshots. All ranks must call it with the same names, and see the same folder."""

    ranks: CheckpointGroup
    export: Callable[[Path, dict[str, Tensor]], None]
    """Writes the plain LLaMA and its tokenizer into a folder."""

    def write(self, snapshot: Snapshot, final: Path) -> None:
        """Write `final`, whole or not at all, by way of `{final}.tmp`.

        Raises `NotSaved` on all ranks when it fails on one, whatever the reason; nothing of it is left then.
        """
        temporary = final.with_name(final.name + ".tmp")
        try:
            self._together_on_main(lambda: _make_anew(temporary))
            shares = self._together(lambda: self._write_share(snapshot, temporary))
            files = {name: entry for share in shares for name, entry in share.items()}
            self._together_on_main(lambda: complete(temporary, final, files))
        except NotSaved:
            if self.ranks.is_main:  # by now no rank writes
                with contextlib.suppress(OSError):
                    run_dir.remove(temporary)
            raise

    def _write_share(self, snapshot: Snapshot, folder: Path) -> dict[str, Any]:
        """What this rank has to write; size and checksum of each of its files."""
        dcp.save(
            snapshot.tensors,
            checkpoint_id=folder / run_dir.TENSORS_DIR,
            process_group=self.ranks.group,
            no_dist=self.ranks.group is None,
        )
        if not self.ranks.is_main:
            return seal(folder, _tensor_files(folder, self.ranks.rank))
        self.export(folder, snapshot.exported)
        write_counters(folder, snapshot.state, snapshot.more)
        others = {name for rank in range(1, self.ranks.size) for name in _tensor_files(folder, rank)}
        return seal(folder, [name for name in run_dir.checkpoint_files(folder) if name not in others])

    def _together_on_main(self, act: Callable[[], None]) -> None:
        """Do something on the main process alone; all raise `NotSaved` when it failed."""
        self._together(act if self.ranks.is_main else lambda: None)

    def _together(self, act: Callable[[], T]) -> list[T]:
        """Do something on all ranks, and return their results; all raise `NotSaved` when one of them failed."""
        mine: tuple[T, None] | tuple[None, str]
        try:
            mine = act(), None
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            mine = None, _reason(self.ranks.rank, error)
        try:
            answers = self.ranks.gather(mine)
        except RuntimeError as error:  # a rank is gone
            raise NotSaved(mine[1] or _reason(self.ranks.rank, error)) from error
        for answer in answers:
            if answer[1] is not None:
                raise NotSaved(answer[1])
        return [answer[0] for answer in answers if answer[1] is None]


def _make_anew(folder: Path) -> None:
    run_dir.remove(folder)  # of whatever type; a link is not followed
    folder.mkdir()  # not its parents: a run's folder that is gone is not made anew


def _tensor_files(folder: Path, rank: int) -> list[str]:
    """Names of the tensor files of one rank, as torch.distributed.checkpoint calls them."""
    return [path.relative_to(folder).as_posix() for path in (folder / run_dir.TENSORS_DIR).glob(f"__{rank}_*.distcp")]


def _reason(rank: int, error: BaseException) -> str:
    """A rank's error on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank = next(iter(error.failures))
    return f"rank {rank}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """An error's reason. What goes wrong with tensors comes as one error with all ranks' stacks."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split())
    # Those whose texts speak for themselves.
    return text if isinstance(error, OSError | ValueError | NotSaved) and text else f"{type(error).__name__}: {text}"


def seal(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Flush files to disk; their sizes and checksums by name."""
    state = folder / run_dir.STATE_FILE
    mode = state.stat().st_mode & 0o777 if state.exists() else None
    files = {}
    for name in names:
        if mode is not None:
            (folder / name).chmod(mode)  # safetensors' files are private to their owner, whatever the umask says
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        files[name] = run_dir.file_digest(folder / name)
    return files


def complete(temporary: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
    """With the sealed files of all ranks in place: write the manifest, and give the checkpoint its name.

    Raises `NotSaved` when a file cannot be seen.
    """
    _wait_for(temporary, files)
    manifest = json.dumps({"files": dict(sorted(files.items()))}, indent=2) + "\n"
    run_dir.write_atomically(temporary / run_dir.MANIFEST_FILE, manifest)
    for folder in (temporary / run_dir.TENSORS_DIR, temporary):
        run_dir.sync_folder(folder)
    replaced = final.with_name(final.name + ".replaced")
    run_dir.remove(replaced)
    if os.path.lexists(final):  # damaged or not this run's, or the run has gone back to it
        final.rename(replaced)  # which `run_dir.remove_leftovers` undoes, should the process die here
    temporary.rename(final)
    run_dir.sync_folder(final.parent)
    run_dir.remove(replaced)


def _wait_for(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Until the main process sees every file in its full size."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while hidden := [name for name, entry in files.items() if not _has_size(folder / name, entry["bytes"])]:
        if time.monotonic() > deadline:
            raise NotSaved(
                f"{folder / hidden[0]} cannot be seen by the main process: is --save_dir on a file system that all "
                "nodes share?"
            )
        time.sleep(0.2)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


class Background:
    """One thing at a time in a thread, which does not keep the process from ending when the main thread fails.

    (Those of `dcp.async_save` do: the interpreter joins them, and one that waits for a lost rank would hang it.)
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, act: Callable[[], None]) -> None:
        """Begin; what was started before must have been waited for."""
        assert self._thread is None

        def guarded() -> None:
            try:
                act()
            except BaseException as error:  # for the main thread
                self._error = error

        self._thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Until it is done, or for so long; raises what it raised."""
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            return
        self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error
