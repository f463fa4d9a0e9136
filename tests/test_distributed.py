"""Two processes under the real torchrun (gloo), compared with one. One launch makes all the runs: see helpers.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import helpers
import pytest
from conftest import write_blocks, write_model
from helpers import GALORE, METHODS, REQUEUE, RESUME, stop_after

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCUMULATION = {"at once": {"batch_size": 4}, "accumulated": {"batch_size": 2}}  # of 8 sequences by two processes
EXACT = 1e-5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """All runs of this module: `one[method]` by one process, `two[name]` by two; what each rank reported, by name."""
    folder = tmp_path_factory.mktemp("distributed")
    # 13 validation batches: in the last round only one rank has something to do.
    data, model = write_blocks(folder / "data", validation=50), write_model(folder / "llama.json")

    def command(name, **changes):
        settings = {
            **{"model_config": model, "dataset_path": data, "save_dir": folder / name, "workers": 0},
            **{"total_batch_size": 8, "lr": 3e-3, "num_training_steps": 20, "warmup_steps": 2},
            **{"eval_every": 10, "save_every": 10, "dtype": "float32", **changes},
        }
        return [str(part) for flag, value in settings.items() for part in (f"--{flag}", value)]

    for method, flags in METHODS.items():
        assert helpers.run(command(f"one {method}", **flags, batch_size=4)) == 0
    stop_after(7, command("from one to two", **GALORE, batch_size=4))

    cases = {
        f"{method} {how}": {"argv": command(f"{method} {how}", **flags, **batch)}
        for method, flags in METHODS.items()
        for how, batch in ACCUMULATION.items()
    }
    cases["from one to two"] = {"argv": [*command("from one to two", **GALORE, batch_size=4), *RESUME]}
    stopped = command("stopped", **GALORE, batch_size=4)
    cases["stopped"] = {"argv": stopped, "signal": [1, 7]}
    cases["resumed"] = {"argv": [*stopped, *RESUME]}
    stopped = command("stopped to evaluate", **GALORE, batch_size=4)
    cases["stopped to evaluate"] = {"argv": stopped, "evaluation_signal": [1, 2]}
    cases["resumed to evaluate"] = {"argv": [*stopped, *RESUME]}
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    launched = subprocess.run(
        [*TORCHRUN, helpers.__file__, str(folder / "cases.json")],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT, "capture_output": True, "text": True},
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr
    saved = folder / "stopped" / "model_8"
    assert helpers.run(command("from two to one", **GALORE, batch_size=4, resume_from=saved)) == 0
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(
        folder=folder,
        reports=dict(zip(cases, zip(*reports, strict=True), strict=True)),
        log=launched.stderr,
    )


def assert_close(one, other, after=-1):
    """Losses, rates, gradient norms and evaluations of two runs; of `other`, from the update `after` on."""
    for read in (helpers.updates, helpers.evaluations):
        rows, expected = read(one), [row for row in read(other) if row[0] > after]
        assert [row[0] for row in rows] == [row[0] for row in expected]
        for row, target in zip(rows, expected, strict=True):
            assert row[1:] == pytest.approx(target[1:], abs=EXACT), f"update {row[0]}"


@pytest.mark.parametrize("how", ACCUMULATION)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(pairs, method, how):
    assert len(helpers.updates(pairs.folder / f"{method} {how}")) == 20
    assert_close(pairs.folder / f"{method} {how}", pairs.folder / f"one {method}")
    rows = [record for record in helpers.records(pairs.folder / f"{method} {how}") if "final_eval_tokens" in record]
    assert [row["final_eval_tokens"] for row in rows] == [50 * 63] * 3  # each row once, over both ranks


def test_gradients_are_reduced_once_an_update(pairs):
    for method in METHODS:
        assert [report["unsynchronised"] for report in pairs.reports[f"{method} at once"]] == [0, 0]
        assert [report["unsynchronised"] for report in pairs.reports[f"{method} accumulated"]] == [20, 20]


def test_the_ranks_hold_the_same_bits(pairs):
    for name, reports in pairs.reports.items():
        assert reports[0]["digest"] == reports[1]["digest"], name
        assert reports[0]["state_digest"] == reports[1]["state_digest"], name
    assert pairs.reports["galore at once"][0]["digest"] != pairs.reports["full_rank at once"][0]["digest"]


def test_a_signal_to_one_rank_stops_both(pairs):
    assert [report["exit_code"] for report in pairs.reports["stopped"]] == [REQUEUE, REQUEUE]
    assert helpers.checkpoints(pairs.folder / "stopped") == [8, 10, 20]
    assert [report["exit_code"] for report in pairs.reports["resumed"]] == [0, 0]
    helpers.assert_same_run(pairs.folder / "stopped", pairs.folder / "galore at once")
    assert pairs.reports["resumed"][0]["digest"] == pairs.reports["galore at once"][0]["digest"]


def test_a_signal_to_one_rank_ends_the_evaluation_of_both(pairs):
    folder = pairs.folder / "stopped to evaluate"
    assert [report["exit_code"] for report in pairs.reports["stopped to evaluate"]] == [REQUEUE, REQUEUE]
    assert helpers.counters(folder / "model_10")["evaluated_step"] == 0
    assert [report["exit_code"] for report in pairs.reports["resumed to evaluate"]] == [0, 0]
    helpers.assert_same_run(folder, pairs.folder / "galore at once")


def test_more_processes_continue_with_the_same_samples(pairs):
    folder = pairs.folder / "from one to two"
    assert helpers.checkpoints(folder) == [7, 10, 20]
    assert [helpers.counters(folder / f"model_{update}")["world_size"] for update in (7, 20)] == [1, 2]
    assert_close(folder, pairs.folder / "one galore")
    assert pairs.log.count("WARNING resuming with another --world_size: 2 instead of 1") == 1


def test_fewer_processes_continue_with_the_same_samples(pairs):
    folder = pairs.folder / "from two to one"
    assert helpers.counters(pairs.folder / "stopped" / "model_8")["world_size"] == 2
    assert [row[0] for row in helpers.updates(folder)] == list(range(9, 21))
    assert_close(folder, pairs.folder / "one galore", after=8)


def test_one_process_speaks(pairs):
    assert pairs.log.count("INFO run folder") == len(pairs.reports)
    assert pairs.log.count("INFO asked to stop: saved update 8") == 1
    assert pairs.log.count("INFO asked to stop: saved update 10") == 1
    assert pairs.log.count("INFO update 20: validation loss") == len(pairs.reports) - 2


def test_bad_input_is_reported_once(tmp_path, model_json):
    flags = ["--model_config", str(model_json), "--lr", "fast", "--dataset_path", str(tmp_path / "none")]
    flags += ["--save_dir", str(tmp_path / "run"), "--batch_size", "4"]
    launched = subprocess.run(
        [*TORCHRUN, str(helpers.PROJECT / "torchrun_main.py"), *flags],
        **{"env": helpers.child_environment(), "cwd": tmp_path, "capture_output": True, "text": True},
        timeout=120,
    )
    assert launched.returncode != 0
    assert [line for line in launched.stderr.splitlines() if line.startswith("error: ")] == [
        "error: --lr must be a number, got 'fast'",
        f"error: --dataset_path {tmp_path / 'none'}: no such folder",
    ]
    assert "exitcode  : 2" in launched.stderr  # torchrun's own report
    assert not (tmp_path / "run").exists()


def test_a_total_batch_that_two_processes_cannot_share(command, monkeypatch, capsys):
    group = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    assert helpers.run(command(batch_size=4, total_batch_size=12)) == 2
    assert "--total_batch_size 12 must be --batch_size 4 x" in capsys.readouterr().err
    monkeypatch.setattr("peft_pretraining.runtime.launcher._SECONDS_TO_SPEAK", 0.0)


@pytest.mark.slow
def test_a_signal_to_one_real_process(command, tmp_path):
    """As above, with the entry point itself and a signal from outside."""
    import psutil

    agent = subprocess.Popen(
        [*TORCHRUN, str(helpers.PROJECT / "torchrun_main.py"), *command(**GALORE, num_training_steps=5000)],
        **{"env": helpers.child_environment(), "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True},
    )
    run = tmp_path / "run"
    try:
        deadline = time.monotonic() + 120
        while not ((run / "metrics.jsonl").exists() and helpers.updates(run)[:5]):
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        ranks = psutil.Process(agent.pid).children()
        (second,) = [rank.pid for rank in ranks if rank.environ().get("RANK") == "1"]
        os.kill(second, signal.SIGUSR1)
        _, err = agent.communicate(timeout=120)
    finally:
        agent.kill()
    assert agent.returncode != 0 and "exitcode  : 75" in err
    last = helpers.updates(run)[-1][0]
    assert helpers.checkpoints(run)[-1] == last and f"saved update {last}" in err
    assert helpers.run([*command(**GALORE, num_training_steps=last + 1), *RESUME]) == 0  # by one process
