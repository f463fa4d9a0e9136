"""`scripts/slurm_pretrain.sh` and the passing on of signals, with a stand-in for Slurm but the real torchrun.

Nothing here needs a cluster: `srun` and `scontrol` are small programs in a folder that comes first on PATH, and a
training process is a few lines without torch that do what torchrun_main.py promises: on SIGUSR1, save and exit with 75.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SCRIPT = PROJECT / "scripts" / "slurm_pretrain.sh"

# One task per host, each in its own process group, to which a signal goes as a whole: as Slurm does it.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [subprocess.Popen(command, start_new_session=True) for _ in os.environ["SLURM_JOB_NODELIST"].split(",")]
signal.signal(signal.SIGUSR1, lambda *_: [os.killpg(task.pid, signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$WORK/scontrol.log"
if [[ $1 == show ]]; then tr , '\\n' <<< "$3"; fi
if [[ $1 == requeue ]]; then exit "${REQUEUE_CODE:-0}"; fi
"""
# Saving takes longer than torchrun would let a process live after a signal of its own (the test sets one second).
TRAINER = """
import os, signal, sys, time
work, rank, stopped = os.environ["WORK"], os.environ["RANK"], []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
open(f"{work}/ready-{rank}", "w").write(" ".join(sys.argv[1:]))
end = time.monotonic() + 90
while not stopped and time.monotonic() < end:  # a failed test leaves nothing behind for long
    time.sleep(0.02)
time.sleep(1.5)
open(f"{work}/saved-{rank}", "w").close()
sys.exit(75)
"""
# scripts/pretrain.sh in all but the program that torchrun runs.
PRETRAIN = f"""#!{sys.executable}
import sys
from pathlib import Path
sys.path.insert(0, "{PROJECT / "scripts"}")
import launch, recipe
recipe.TRAINER = Path(__file__).with_name("trainer.py")
sys.exit(launch.main())
"""


@pytest.fixture
def submit(tmp_path: Path):
    """Start the script as Slurm would on the first node; gives the process."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("pretrain", PRETRAIN), ("trainer.py", TRAINER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    jobs = []

    def start(*arguments: str, program: str = "pretrain", hosts: str = "localhost", **environment: str):
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": hosts, "SLURM_SUBMIT_DIR": str(PROJECT)}
        slurm |= {"SLURM_GPUS_ON_NODE": "2", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "OMP_NUM_THREADS": "1"}
        test = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORK": str(tmp_path)}
        test |= {"PRETRAIN_COMMAND": str(tmp_path / program)}
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            **{"env": {**os.environ, **slurm, **test, **environment}, "cwd": tmp_path, "text": True},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True},
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        if job.poll() is None:
            job.kill()


def stub(folder: Path, text: str) -> str:
    """A program to run on every node."""
    (folder / "stub").write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / "stub").chmod(0o755)
    return "stub"


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def requeues(folder: Path) -> list[str]:
    return [line for line in (folder / "scontrol.log").read_text().splitlines() if line.startswith("requeue")]


def test_signal_reaches_every_training_process_and_the_job_is_requeued_once(submit, tmp_path):
    job = submit("60m", "galore", "--lr", "0.5", hosts="localhost,localhost")
    ranks = range(4)  # two nodes of two processes
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in ranks))
    job.send_signal(signal.SIGUSR1)  # to the batch shell only, as --signal=B:
    output, _ = job.communicate(timeout=60)

    assert [rank for rank in ranks if (tmp_path / f"saved-{rank}").exists()] == [*ranks], output
    assert job.returncode == 0, output
    assert requeues(tmp_path) == [f"requeue {os.getpid()}"]
    assert output.count("--nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:") == 2
    flags = (tmp_path / "ready-0").read_text()
    assert "--method galore" in flags
    assert "--batch_size 128" in flags  # 512 over four devices
    assert flags.endswith("--lr 0.5")


def test_normal_end_is_not_requeued(submit, tmp_path):
    job = submit("60m", "galore", program=stub(tmp_path, 'echo "$@" > "$WORK/arguments"'))
    output, _ = job.communicate(timeout=20)
    assert (job.returncode, requeues(tmp_path)) == (0, []), output
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:-1] == "60m galore --nproc 2 --nnodes 1 --rdzv_endpoint".split()
    assert 10_000 <= int(arguments[-1].removeprefix("localhost:")) < 30_000


def test_finishing_in_spite_of_the_signal_is_not_requeued(submit, tmp_path):
    job = submit(
        program=stub(tmp_path, 'trap "exit 0" USR1; touch "$WORK/ready-0"; for _ in {1..400}; do sleep 0.05; done')
    )
    wait_for((tmp_path / "ready-0").exists)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=20)
    assert (job.returncode, requeues(tmp_path)) == (0, []), output


def test_crash_passes_its_exit_code_on(submit, tmp_path):
    job = submit(program=stub(tmp_path, "exit 3"))
    output, _ = job.communicate(timeout=20)
    assert (job.returncode, requeues(tmp_path)) == (3, []), output


def test_refused_requeue_is_a_failure(submit, tmp_path):
    program = stub(tmp_path, 'trap "exit 1" USR1; touch "$WORK/ready-0"; for _ in {1..400}; do sleep 0.05; done')
    job = submit(program=program, REQUEUE_CODE="7")
    wait_for((tmp_path / "ready-0").exists)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=20)
    assert (job.returncode, len(requeues(tmp_path))) == (7, 1), output


def test_wrong_folder_and_missing_slurm_are_said(submit, tmp_path):
    job = submit("60m", "galore", PRETRAIN_COMMAND="", SLURM_SUBMIT_DIR=str(tmp_path))
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 2
    assert re.fullmatch(
        r"error: no .*/scripts/pretrain.sh: submit from the project's folder, or set PROJECT_DIR\n", output
    )
    job = submit("60m", "galore", SLURM_JOB_ID="")
    output, _ = job.communicate(timeout=20)
    assert job.returncode != 0
    assert "run this under Slurm: sbatch" in output


def test_sigterm_goes_to_torchrun_and_its_exit_code_comes_back(tmp_path):
    torchrun = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(9)); print('up', flush=True); time.sleep(60)"
    )
    for number, expected in ((signal.SIGTERM, 9), (signal.SIGHUP, 128 + signal.SIGHUP)):
        run = f"import sys, launch; sys.exit(launch.run([sys.executable, '-c', {torchrun!r}]))"
        process = subprocess.Popen(
            [sys.executable, "-c", run], cwd=PROJECT / "scripts", stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(timeout=20) == expected


def test_sbatch_options():
    options = re.findall(r"^#SBATCH --(\S+)$", SCRIPT.read_text(), flags=re.MULTILINE)
    assert {"ntasks-per-node=1", "requeue", "open-mode=append", "signal=B:SIGUSR1@120"} <= set(options)
