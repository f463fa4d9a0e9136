"""One owner per folder: who is refused, and which dead owners do not hold it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from peft_pretraining.checkpoint import folder_lock
from peft_pretraining.checkpoint.folder_lock import (
    LOCK_FILE,
    OWNER_FILE,
    FolderInUse,
    FolderLock,
    process_start,
    read_owner,
)

_HOLDER = """
import sys, time
from peft_pretraining.checkpoint.folder_lock import FolderLock
lock = FolderLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A function that starts a process which holds `tmp_path`, and returns it."""
    started = []

    def start(**environ: str) -> subprocess.Popen:
        command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
        environ = {**os.environ, "PYTHONPATH": os.getcwd(), **environ}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_second_owner_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    process = holder()
    began = time.monotonic()
    with pytest.raises(FolderInUse) as refused:
        FolderLock(tmp_path).acquire()
    assert time.monotonic() - began < 5
    message = str(refused.value)
    assert f"process {process.pid} on {socket.gethostname()}, since 20" in message
    assert "\n" not in message


def test_killed_owner_does_not_hold_the_folder(tmp_path, holder):
    process = holder()
    process.kill()
    process.wait()
    with FolderLock(tmp_path):
        assert read_owner(tmp_path).pid == os.getpid()


def test_released_folder_is_free_and_has_no_trace(tmp_path):
    for _ in range(2):
        with FolderLock(tmp_path) as lock:
            assert not lock.lost
    assert not (tmp_path / OWNER_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_same_process_cannot_hold_a_folder_twice(tmp_path):
    with FolderLock(tmp_path), pytest.raises(FolderInUse, match=f"process {os.getpid()} "):
        FolderLock(tmp_path).acquire()


def test_owner_whose_launcher_is_gone_is_waited_for(tmp_path, holder):
    process = holder()
    owner = json.loads((tmp_path / OWNER_FILE).read_text())
    owner["launcher"] = [2**22 + 1, 12345]  # beyond the largest process id
    (tmp_path / OWNER_FILE).write_text(json.dumps(owner))
    threading.Timer(1.0, process.kill).start()
    threading.Timer(1.1, process.wait).start()
    with FolderLock(tmp_path):
        assert process.poll() is not None


def test_launcher_is_recorded_under_torchrun(tmp_path, holder):
    holder(TORCHELASTIC_RUN_ID="none")
    assert read_owner(tmp_path).launcher == (os.getpid(), process_start(os.getpid()))


def _as_if_on(host: str, folder) -> None:
    """Make the present owner of the folder look like one of another host."""
    for name in (LOCK_FILE, OWNER_FILE):
        path = folder / name
        with open(path, "r+") as file:  # in place: another inode is another owner
            content = file.read().replace(socket.gethostname(), host)
            file.seek(0)
            file.truncate()
            file.write(content)


def test_owner_on_another_host_holds_the_folder_while_it_gives_signs_of_life(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(folder_lock, "HEARTBEAT", 0.5)
    monkeypatch.setattr(folder_lock, "_SECONDS_TO_END", 1.0)
    holder()
    _as_if_on("elsewhere", tmp_path)
    threading.Timer(1.0, lambda: os.utime(tmp_path / LOCK_FILE)).start()
    with pytest.raises(FolderInUse, match="on elsewhere"):
        FolderLock(tmp_path).acquire()


def test_owner_on_another_host_without_signs_of_life_does_not_hold_the_folder(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(folder_lock, "LEASE", 1.5)
    monkeypatch.setattr(folder_lock, "HEARTBEAT", 0.5)
    monkeypatch.setattr(folder_lock, "_SECONDS_TO_END", 1.0)
    process = holder()
    process.kill()
    process.wait()
    # The contender sees a lease of its own duration.
    text = (tmp_path / LOCK_FILE).read_text().replace("180.0", "1.5")
    (tmp_path / LOCK_FILE).write_text(text)
    _as_if_on("elsewhere", tmp_path)
    with FolderLock(tmp_path):
        assert read_owner(tmp_path).host == socket.gethostname()


def test_loss_of_the_folder_is_noticed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder).acquire()
    (folder / LOCK_FILE).unlink()
    assert lock.lost
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "null", '{"host": "a", "pid": "x"}', "[" * 100000])
def test_unreadable_owner_file_is_nobody_known(tmp_path, content):
    (tmp_path / OWNER_FILE).write_text(content)
    assert str(read_owner(tmp_path)) == "another process"
