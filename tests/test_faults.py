"""Lost ranks, hanging ranks and several agents, under the real torchrun: the run ends with the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import psutil
import pytest
from helpers import GALORE, PROJECT

from peft_pretraining.runtime.watchdog import EXIT_STUCK

LAST = 80
BAD = (54, 59)
"""0-based updates with a bad batch, which are skipped as spikes."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ONE_NODE = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
FAULTY = str(PROJECT / "tests" / "faulty_run.py")
PATIENCE = 150


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    from conftest import write_blocks, write_model

    folder = tmp_path_factory.mktemp("faults")
    return {
        **{"model_config": write_model(folder / "llama.json"), "dataset_path": write_blocks(folder / "data")},
        **{"batch_size": 4, "total_batch_size": 8, "lr": 1e-2, "num_training_steps": LAST, "warmup_steps": 2},
        **{"eval_every": 40, "save_every": 10, "workers": 1, "autoresume": True, "skip_spikes": 8, **GALORE},
    }


@pytest.fixture(scope="module")
def flags(settings):
    def build(save_dir: Path, **changes) -> list[str]:
        return [str(word) for name, value in {**settings, **changes}.items() for word in (f"--{name}", value)] + [
            "--save_dir",
            str(save_dir),
        ]

    return build


def faults(folder: Path, **what) -> str:
    """A file for faulty_run.py in `folder`, where the ranks leave their digests too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "faults.json"
    path.write_text(json.dumps({"bad": BAD, "digests": str(folder), **what}))
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, flags):
    """The run's folder: two ranks, nothing but the bad batches."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with launched([*ONE_NODE, FAULTY, faults(folder), *flags(folder / "run")], folder / "log") as agent:
        assert agent.wait(PATIENCE) == 0, (folder / "log").read_text()
    return folder / "run"


@contextlib.contextmanager
def launched(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A launcher, its output in `log`; whatever is left of it at the end is killed."""
    with open(log, "a") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=file, cwd=log.parent, env=helpers.child_environment())
    try:
        yield agent
    finally:
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(agent.pid).children(recursive=True)
        agent.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        agent.wait()


def ranks(agent: subprocess.Popen) -> dict[int, int]:
    """Rank to process id."""
    found = {}
    for process in psutil.Process(agent.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error, KeyError):
            if process.ppid() == agent.pid or psutil.Process(process.ppid()).ppid() == agent.pid:
                environment = process.environ()
                if "multiprocessing" not in " ".join(process.cmdline()):
                    found.setdefault(int(environment["RANK"]), process.pid)
    return found


def wait_until(condition: Callable[[], object], agent: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert agent.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.005)


def update_reached(run: Path, update: int) -> bool:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return bool(lines) and json.loads(lines[-1])["update_step"] >= update


def test_a_killed_rank_and_a_hanging_one_come_back(flags, undisturbed, tmp_path):
    """kill -9 of one rank, then a data loader that hangs on the other: torchrun restarts both times."""
    run, log = tmp_path / "run", tmp_path / "log"
    fault = faults(tmp_path, hang=[0, 46])
    command = [*ONE_NODE, "--max-restarts", "3", FAULTY, fault, *flags(run, step_timeout=6)]
    with launched(command, log) as agent:
        wait_until(lambda: update_reached(run, 12), agent, log)
        os.kill(ranks(agent)[1], signal.SIGKILL)
        assert agent.wait(PATIENCE) == 0, log.read_text()
    text = log.read_text()
    assert "resuming from" in text and (tmp_path / "faults.hung").exists()
    assert f"exitcode: {EXIT_STUCK}" in text or f"exit code {EXIT_STUCK}" in text
    stuck = (run / "stuck_rank0.txt").read_text()
    assert "rank 0: update 46 took more than 6 s (--step_timeout 6); exit code 124." in stuck
    assert 'File "' in stuck and "next_micro_batches" in stuck and "Thread" in stuck
    helpers.assert_same_run(run, undisturbed)


def workers_of(folder: Path) -> list[psutil.Process]:
    """Processes that were started with this folder in their environment."""
    return [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("CRASH_TEST") == str(folder)
    ]


def test_a_crash_ends_the_process_at_once_its_workers_too(flags, tmp_path):
    """Not the 30 s after which torchrun would kill it, and not never."""
    command = [sys.executable, FAULTY, faults(tmp_path, crash=12), *flags(tmp_path / "run")]
    began = time.monotonic()
    environment = helpers.child_environment(RANK="0", CRASH_TEST=str(tmp_path))
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    ended = time.time() - (tmp_path / "run" / "metrics.jsonl").stat().st_mtime
    assert ended < 10 and time.monotonic() - began < 100
    _, left = psutil.wait_procs(workers_of(tmp_path), timeout=5)  # the kernel kills them a moment later
    assert not left, [(process.cmdline(), process.ppid()) for process in left]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_an_error_on_one_rank_before_a_save_begins_ends_the_other(flags, tmp_path, layout):
    """Not after the hours that the ranks give each other for a save."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*ONE_NODE, FAULTY, faults(tmp_path, crash_in_save=1), *flags(run, distributed_type=layout)]
    with launched(command, log) as agent:
        wait_until(lambda: update_reached(run, 10), agent, log)
        processes = [psutil.Process(pid) for pid in ranks(agent).values()]
        began = time.monotonic()
        assert agent.wait(PATIENCE) == 1
        assert not psutil.wait_procs(processes, timeout=10)[1] and time.monotonic() - began < 60
    assert "ZeroDivisionError: division by zero" in log.read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_before_a_save_is_ended_by_the_watchdog(flags, tmp_path, monkeypatch):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*ONE_NODE, FAULTY, faults(tmp_path, hang_in_save=1), *flags(run, step_timeout=0.5)]
    with launched(command, log) as agent:
        assert agent.wait(PATIENCE) == 1, log.read_text()
    assert "a save took more than 30 s (--step_timeout 0.5, times 60 for this); exit code 124" in log.read_text()


def test_both_ranks_skip_the_same_updates(undisturbed):
    reports = [json.loads((undisturbed.parent / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1]  # digest of the weights, statistics, counts
    assert reports[0]["skipped_spikes"] == len(BAD)
    skipped = [record["update_step"] - 1 for record in helpers.records(undisturbed) if record.get("skipped")]
    assert skipped == [*BAD]


@pytest.mark.slow
def test_all_ranks_are_killed_then_the_same_command(flags, undisturbed, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*ONE_NODE, FAULTY, faults(tmp_path), *flags(run)]
    with launched(command, log) as agent:
        wait_until(lambda: update_reached(run, 33), agent, log)
        for pid in ranks(agent).values():
            os.kill(pid, signal.SIGKILL)
        assert agent.wait(PATIENCE) != 0
    assert helpers.checkpoints(run)[-1] < LAST
    with launched(command, log) as agent:
        assert agent.wait(PATIENCE) == 0, log.read_text()
    helpers.assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_the_launcher_is_killed(flags, undisturbed, tmp_path):
    """kill -9 of torchrun: its processes save and end by themselves instead of training on without it."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*ONE_NODE, FAULTY, faults(tmp_path), *flags(run)]
    with launched(command, log) as agent:
        wait_until(lambda: update_reached(run, 23), agent, log)
        processes = [psutil.Process(pid) for pid in ranks(agent).values()]
        agent.kill()
        _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
        assert len(processes) == 2 and not alive
    stopped = helpers.updates(run)[-1][0]
    assert stopped < LAST and helpers.checkpoints(run)[-1] == stopped
    with launched(command, log) as agent:
        assert agent.wait(PATIENCE) == 0, log.read_text()
    helpers.assert_same_run(run, undisturbed)


def test_sigterm_to_the_launcher_saves_and_does_not_restart(flags, undisturbed, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*ONE_NODE, "--max-restarts", "2", FAULTY, faults(tmp_path), *flags(run)]
    with launched(command, log) as agent:
        wait_until(lambda: update_reached(run, 23), agent, log)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(PATIENCE) != 0
    stopped = helpers.updates(run)[-1][0]
    assert stopped < LAST and helpers.checkpoints(run)[-1] == stopped
    assert log.read_text().count("INFO run folder") == 1  # started once
    with launched(command, log) as agent:
        assert agent.wait(PATIENCE) == 0, log.read_text()
    helpers.assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_sigusr1_to_the_launch_script_saves_and_does_not_restart(flags, tmp_path):
    """scripts/pretrain.sh with restarts: exit code 75, once everything is saved; then the same command again."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = flags(run, max_length=64, eval_every=1000, clip_grad_norm=1)
    words = [word for name, value in zip(words[::2], words[1::2], strict=True) if name != "--method"
             for word in (name, value)]  # fmt: skip
    command = [str(PROJECT / "scripts" / "pretrain.sh"), "60m", "galore", "--nproc", "2", "--max_restarts", "3", *words]
    with launched(command, log) as script:
        wait_until(lambda: update_reached(run, 23), script, log)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(PATIENCE) == helpers.REQUEUE, log.read_text()
    stopped = helpers.updates(run)[-1][0]
    assert stopped < LAST and helpers.checkpoints(run)[-1] == stopped
    with launched(command, log) as script:
        assert script.wait(PATIENCE) == 0, log.read_text()
    assert helpers.checkpoints(run)[-1] == LAST
    bad = [*command, "--lr", "fast"]
    with launched(bad, tmp_path / "bad") as script:
        assert script.wait(PATIENCE) == 2
    assert (tmp_path / "bad").read_text().splitlines()[1:] == ["error: --lr must be a number, got 'fast'"]


@pytest.mark.slow
def test_two_agents_equal_one(flags, undisturbed, tmp_path, monkeypatch):
    """Two nodes' torchruns on this machine, which meet by c10d; one of them loses its rank on the way."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command = [*TORCHRUN, *nodes, "--max-restarts", "2", FAULTY, faults(tmp_path), *flags(run)]
    logs = [tmp_path / f"log{node}" for node in range(2)]
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see docs/launching.md
    with launched(command, logs[0]) as one, launched(command, logs[1]) as other:
        wait_until(lambda: update_reached(run, 33), one, logs[0])
        os.kill(next(iter(ranks(other).values())), signal.SIGKILL)
        codes = [agent.wait(PATIENCE) for agent in (one, other)]
    assert codes == [0, 0], "".join(log.read_text() for log in logs)
    helpers.assert_same_run(run, undisturbed)
