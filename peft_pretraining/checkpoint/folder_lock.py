"""One owner per folder: whatever writes into a folder over time (a run, a study, pre-tokenisation) holds it meanwhile.

    folder/.lock         filelock's lease: host, process and the process's start, touched every HEARTBEAT seconds
    folder/.lock.owner   the same for people: JSON with host, process, start and launcher

The lease is a marker file created exclusively, which shared file systems support, too. A dead owner does not hold it:
on this host because its process is gone (a reused process id has another start), on another host because nobody has
touched the marker for LEASE seconds, which whoever wants the folder watches by its own clock. Nothing here imports
torch.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from peft_pretraining.checkpoint.plain_files import regular

log = logging.getLogger("peft_pretraining")

LOCK_FILE = ".lock"
OWNER_FILE = ".lock.owner"

LEASE = 180.0
"""Seconds without a sign of life after which an owner on another host counts as dead."""
HEARTBEAT = 20.0
"""Seconds between an owner's signs of life."""
_SECONDS_TO_END = 90.0
"""How long an owner whose launcher is gone may take to end: it finishes its update and saves."""
_POLL = 0.2


class FolderInUse(RuntimeError):
    """Somebody else holds the folder; the message is one line that names host, process and start."""


@dataclass(frozen=True)
class Owner:
    """Who holds a folder, as far as it is known."""

    host: str | None = None
    pid: int | None = None
    started: str | None = None
    """When the folder was taken, ISO 8601."""
    launcher: tuple[int, int] | None = None
    """Process id and start (clock ticks since boot) of the launcher above the owner, if it has one."""

    def __str__(self) -> str:
        if self.pid is None:
            return "another process"
        return f"process {self.pid} on {self.host}, since {self.started or 'an unknown time'}"


class FolderLock:
    """Exclusive use of a folder, from `acquire` to `release` or the end of the process; also a context manager.

    Forked children do not hold it. The folder must exist.

    >>> import tempfile
    >>> with FolderLock(tempfile.mkdtemp()) as lock:
    ...     FolderLock(lock.folder).acquire()
    Traceback (most recent call last):
    peft_pretraining.checkpoint.folder_lock.FolderInUse: ...
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lease = filelock.SoftFileLease(
            str(self.folder / LOCK_FILE), lease_duration=LEASE, heartbeat_interval=HEARTBEAT, thread_local=False
        )

    def acquire(self) -> FolderLock:
        """Take the folder. Raises `FolderInUse` where somebody else holds it, and `OSError` where none can be held.

        Returns at once, but for two owners that may be dying: one whose launcher is gone, which ends by itself, and one
        on another host, which is watched until it gives a sign of life or has given none for `LEASE` seconds.
        """
        patience, said, mark = 0.0, False, self._mark()
        began = time.monotonic()
        while not self._try():
            owner = read_owner(self.folder)
            if not said:
                patience = self._patience(owner)
            if time.monotonic() - began >= patience or (patience > _SECONDS_TO_END and self._mark() != mark):
                raise FolderInUse(
                    f"{self.folder} is in use by {owner}: wait until it has ended, or stop it; two would destroy each "
                    "other's work"
                )
            if not said:
                log.info("%s is in use by %s; seeing whether it has ended", self.folder, owner)
                said = True
            time.sleep(_POLL)
        _write_owner(self.folder)
        return self

    @property
    def lost(self) -> bool:
        """Whether the folder was taken away, or removed, since it was acquired."""
        return self._lease.compromise is not None or not (self.folder / LOCK_FILE).exists()

    def release(self) -> None:
        """Give the folder back. Does nothing where it is not held."""
        if self._lease.is_locked:
            if not self.lost:
                (self.folder / OWNER_FILE).unlink(missing_ok=True)
            self._lease.release()

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> bool:
        try:
            self._lease.acquire(timeout=0)
        except filelock.Timeout:
            return False
        return True

    def _mark(self) -> tuple[int, int] | None:
        """The marker's present state: it changes with each sign of life."""
        try:
            found = os.stat(self.folder / LOCK_FILE)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _patience(self, owner: Owner) -> float:
        """Seconds to wait for the owner to be found dead."""
        if owner.host != socket.gethostname():
            return LEASE + 2 * HEARTBEAT
        launcher_is_gone = owner.launcher is not None and process_start(owner.launcher[0]) != owner.launcher[1]
        return _SECONDS_TO_END if launcher_is_gone else 0.0


def read_owner(folder: str | Path) -> Owner:
    """Returns who holds the folder, from its owner file; all unknown where that cannot be read."""
    try:
        content: Any = json.loads(regular(Path(folder) / OWNER_FILE).read_text())
        launcher = content["launcher"]
        return Owner(
            str(content["host"]),
            int(content["pid"]),
            str(content["started"]),
            (int(launcher[0]), int(launcher[1])) if launcher else None,
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return Owner()


def process_start(pid: int) -> int | None:
    """Returns when a process of this host was started, in clock ticks since boot; None where there is none or the
    system does not tell (other systems than Linux)."""
    try:
        # The name, in parentheses, may hold anything; a zombie has ended.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _write_owner(folder: Path) -> None:
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    parent = os.getppid()
    start = process_start(parent) if launched else None
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "launcher": None if start is None else [parent, start],
    }
    temporary = folder / f"{OWNER_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(owner) + "\n")
    os.replace(temporary, folder / OWNER_FILE)
