"""`scripts/slurm_pretrain.sh` and the passing on of signals, with a stand-in for Slurm but the real torchrun.

Nothing here needs a cluster: `srun` and `scontrol` are small programs in a folder that comes first on PATH, and a
training process is a few lines without torch that do what torchrun_main.py promises: on SIGUSR1, save and exit with 75.
"""

from __future__ import annotations

import os
import re
import shlex
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
open(f"{work}/starts", "a").write("x")
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
launch.check_flags = lambda *_: None
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


def wait_for(condition: Callable[[], object], seconds: float = 150) -> None:
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
    assert (tmp_path / "starts").read_text() == "xxxx"  # torchrun may restart, but not after this
    assert output.count("torchrun --max_restarts 3 --nnodes 2") == 2
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
    assert arguments[:-1] == "--max_restarts 3 60m galore --nproc 2 --nnodes 1 --rdzv_endpoint".split()
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


def test_a_signal_before_training_processes_are_there_ends_torchrun(tmp_path):
    torchrun = "import time; print('up', flush=True); time.sleep(60)"
    run = f"import sys, launch; sys.exit(launch.run([sys.executable, '-c', {torchrun!r}], 1))"
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        with subprocess.Popen(
            [sys.executable, "-c", "import launch; launch.SECONDS_TO_START = launch.SECONDS_TO_END = 0.1; " + run],
            **{"cwd": PROJECT / "scripts", "stdout": subprocess.PIPE, "start_new_session": True},
        ) as process:
            assert process.stdout.readline() == b"up\n"
            process.send_signal(number)
            assert process.wait(timeout=20) == 75


def test_torchrun_does_not_outlive_a_script_that_is_killed():
    torchrun = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    run = f"import sys, launch; sys.exit(launch.run([sys.executable, '-c', {torchrun!r}], 1))"
    with subprocess.Popen([sys.executable, "-c", run], cwd=PROJECT / "scripts", stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.kill()
        wait_for(lambda: not Path(f"/proc/{child}").exists(), 20)


def test_sbatch_options():
    options = re.findall(r"^#SBATCH --(\S+)$", SCRIPT.read_text(), flags=re.MULTILINE)
    assert {"ntasks-per-node=1", "requeue", "open-mode=append", "signal=B:SIGUSR1@120"} <= set(options)


def test_dry_run_outside_slurm(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(SCRIPT), "60m", "galore", "--dry_run", "--max_restarts", "1"],
        **{"env": {**environment, "SLURM_JOB_NUM_NODES": "4"}, "cwd": PROJECT, "capture_output": True, "text": True},
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "torchrun --max_restarts 1 --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d" in done.stdout


PRETOKENIZE = PROJECT / "scripts" / "slurm_pretokenize.sh"
# Runs an array's tasks at once and the rest after them, as the dependency says; knows job 7 from before.
SBATCH = """#!/usr/bin/env bash
printf '%s\n' "$*" >> "$WORK/sbatch.log"
for word in "$@"; do
    if [[ $word == --array=* ]]; then tasks=${word#--array=0-}; tasks=${tasks%\\%*}; fi
done
for ((task = 0; task <= ${tasks:-0}; task++)); do
    if [[ -n ${tasks:-} ]]; then export SLURM_ARRAY_TASK_ID=$task; fi
    /bin/sh -c "${!#}" >> "$WORK/jobs.log" 2>&1 || { echo "job failed" >> "$WORK/jobs.log"; exit 1; }
done
echo "7;cluster"
"""


def pretokenize(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    return subprocess.run(
        ["bash", str(PRETOKENIZE), *arguments],
        **{"env": {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "WORK": str(folder), "CPUS_PER_TASK": "1"}},
        **{"cwd": folder, "capture_output": True, "text": True},
    )


@pytest.mark.slow
def test_pretokenizing_submits_an_array_and_a_merge_that_waits_for_it(tmp_path):
    """The jobs are run for real, with a tokenizer without a network and a file name that a shell would tear apart."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    for part in range(3):
        text = "\n\n".join(f"Document {number} of part {part} is here." for number in range(40))
        (tmp_path / f"a part {part}.txt").write_text(text)
    flags = ["--dataset", str(tmp_path / "a part *.txt"), "--tokenizer", str(tmp_path / "byt5"), "--save_dir", "out"]
    flags += ["--validation_fraction", "0.2", "--sequence_length", "16", "--num_shards", "2"]
    dry = pretokenize(tmp_path, *flags, "--dry_run")
    assert (dry.returncode, dry.stdout.count("\n"), (tmp_path / "sbatch.log").exists()) == (0, 2, False), dry.stderr

    done = pretokenize(tmp_path, *flags)
    assert done.returncode == 0, done.stderr + (tmp_path / "jobs.log").read_text()
    array, merge = (tmp_path / "sbatch.log").read_text().splitlines()
    assert "--parsable --requeue" in array and "--array=0-1%64" in array and "--cpus-per-task=1" in array
    assert "--dependency=afterok:7 --kill-on-invalid-dep=yes" in merge and merge.endswith("--merge")
    (result,) = (path for path in (tmp_path / "out").iterdir() if path.suffix != ".slices")
    assert '"slices": 2' in (result / "args.json").read_text()
    shown = shlex.split(dry.stdout.splitlines()[0])
    assert shown[:2] == ["sbatch", "--parsable"] and flags[1] in shlex.split(shown[-1])


def test_bad_input_to_the_pretokenizing_script(tmp_path):
    for arguments, message in (
        ([], "error: --num_shards must be a positive integer, got ''"),
        (["--num_shards"], "error: --num_shards must be a positive integer, got ''"),
        (["--num_shards=0"], "error: --num_shards must be a positive integer, got '0'"),
        (["--num_shards", "3", "--merge"], "error: --merge is for this script to give (CPUS_PER_TASK sets --num_cpu)"),
    ):
        done = pretokenize(tmp_path, *arguments)
        assert (done.returncode, done.stderr) == (2, message + "\n")
    assert not (tmp_path / "sbatch.log").exists()
