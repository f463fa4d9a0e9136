"""Checkpoints that are written beside the training, and saves that fail: real processes, and really too little room.

One process makes all runs of one world size, one after the other (saving_run.py): starting processes costs more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
from conftest import write_blocks, write_model
from helpers import GALORE, PROJECT, REQUEUE
from test_faults import PATIENCE, launched, ranks, update_reached, wait_until

from peft_pretraining.checkpoint import run_dir, writer

SCRIPT = str(PROJECT / "tests" / "saving_run.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ASYNC, FSDP, RESUME = {"async_save": True}, {"distributed_type": "fsdp"}, {"autoresume": True}
REWIND = {"rewind_on_nan": 1}
FULL = (7, 12)
"""0-based updates between which there is no room: the save of update 10 fails, those of 5 and 15 do not."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Command lines of runs of 20 updates that are saved every 5, in folders of their names."""
    folder = tmp_path_factory.mktemp("saving")
    data, model = write_blocks(folder / "data"), write_model(folder / "llama.json")

    def build(name, **changes):
        settings = {
            **{"model_config": model, "dataset_path": data, "workers": 0, "batch_size": 4, "total_batch_size": 8},
            **{"lr": 1e-2, "num_training_steps": 20, "warmup_steps": 2, "eval_every": 10, "save_every": 5},
            **{"dtype": "float32", **GALORE, **changes, "save_dir": folder / name},
        }
        return [str(part) for flag, value in settings.items() for part in (f"--{flag}", value)]

    build.folder = folder
    return build


def launch(folder: Path, name: str, processes: int, cases: dict[str, dict]) -> SimpleNamespace:
    """Make the runs; `results[case][rank]` and `logs[case]`, the lines that both ranks wrote."""
    place = folder / name
    place.mkdir()
    (place / "cases.json").write_text(json.dumps(list(cases.values())))
    done = subprocess.run(
        [*(TORCHRUN if processes > 1 else [sys.executable]), SCRIPT, str(place / "cases.json")],
        **{"env": helpers.child_environment(), "cwd": PROJECT, "capture_output": True, "text": True},
        timeout=240,
    )
    assert done.returncode == 0, helpers.last_words(done.stderr)
    reports = [json.loads((place / f"rank{rank}.json").read_text()) for rank in range(processes)]
    results = dict(zip(cases, zip(*reports, strict=True), strict=True))
    return SimpleNamespace(folder=folder, results=results, log=done.stderr)


def case(argv: list[str], **faults) -> dict:
    return {"argv": argv, **faults}


def lines(runs: SimpleNamespace, name: str, text: str) -> list[str]:
    """What was logged with `text` in it while the run `name` was made (for the first time)."""
    mine, found = False, []
    for line in runs.log.splitlines():
        if line.startswith("case "):
            mine = line == f"case {runs.folder / name}"
        elif mine and text in line:
            found.append(line)
    return found


@pytest.fixture(scope="module")
def one(command):
    """The runs of one process."""
    return launch(
        *(command.folder, "one process", 1),
        {
            "sync": case(command("sync")),
            "async": case(command("async", **ASYNC)),
            "full sync": case(command("full sync"), no_room=[0, *FULL]),
            "full async": case(command("full async", **ASYNC), no_room=[0, *FULL]),
            "full at the end": case(command("full at the end", **ASYNC), no_room=[0, 17, None]),
            "full when stopped": case(command("full when stopped"), no_room=[0, 7, None], signal=8),
            "room again": case(command("room again", **ASYNC), no_room=[0, 17, None], room_at_retry=True),
            "keep one": case(command("keep one", **ASYNC, keep_checkpoints=1), slow=[10, 0.5]),
            "stopped": case(command("stopped", **ASYNC), slow=[10, 1.0], signal=11),
            "stopped, resumed": case(command("stopped", **ASYNC, **RESUME)),
        },
    )


@pytest.fixture(scope="module")
def two(command, killed):
    """The runs of two ranks."""
    fsdp = command("fsdp sync", **FSDP)
    return launch(
        *(command.folder, "two ranks", 2),
        {
            "ddp sync": case(command("ddp sync")),
            "ddp async": case(command("ddp async", **ASYNC)),
            "fsdp sync": case(fsdp),
            "fsdp async": case(command("fsdp async", **ASYNC, **FSDP)),
            "one full sync": case(command("one full sync"), no_room=[1, *FULL]),
            "one full async": case(command("one full async", **ASYNC, **FSDP), no_room=[1, *FULL]),
            "one full at the end": case(command("one full at the end", **ASYNC), no_room=[1, 17, None]),
            "damaged": case(
                command("damaged", **FSDP, **RESUME),
                damage=[fsdp[-1], "model_20/training_state/__1_0.distcp"],
            ),
            "killed, resumed": case(command("killed", **ASYNC, **RESUME)),
            "gone back": case(command("gone back", **FSDP, **REWIND), spoil=13),
            "gone back, stopped": case(command("gone back twice", **FSDP, **REWIND, **ASYNC), spoil=13, signal=17),
            "gone back, resumed": case(command("gone back twice", **FSDP, **REWIND, **ASYNC, **RESUME)),
            "not finite": case(command("not finite"), spoil=14),
        },
    )


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """A run of two ranks that were killed while the checkpoint of update 10 was written; what lay there then."""
    place, run = tmp_path_factory.mktemp("killed"), command.folder / "killed"
    cases = place / "cases.json"
    cases.write_text(json.dumps([case(command("killed", **ASYNC), slow=[10, 600])]))
    with launched([*TORCHRUN, SCRIPT, str(cases)], place / "log") as agent:
        # Training has gone on meanwhile.
        wait_until(lambda: update_reached(run, 13) and (run / "model_10.tmp").is_dir(), agent, place / "log")
        for pid in ranks(agent).values():
            os.kill(pid, signal.SIGKILL)
        assert agent.wait(PATIENCE) != 0
    return SimpleNamespace(checkpoints=helpers.checkpoints(run), unfinished=helpers.unfinished(run))


# No longer finite.


def test_both_ranks_go_back(two):
    assert [result["exit_code"] for result in two.results["gone back"]] == [0, 0]
    assert [result["exit_code"] for result in two.results["gone back, stopped"]] == [75, 75]
    for rank in range(2):
        assert two.results["gone back"][rank]["digest"] == two.results["gone back, resumed"][rank]["digest"]
    helpers.assert_same_run(two.folder / "gone back twice", two.folder / "gone back")
    (rewind,) = helpers.counters(two.folder / "gone back" / "model_20")["rewinds"]
    assert rewind["to_update"] == 10


def test_neither_rank_saves_what_is_not_finite(two):
    assert [result["exit_code"] for result in two.results["not finite"]] == [1, 1]
    assert helpers.checkpoints(two.folder / "not finite") == [5, 10]
    assert len(lines(two, "not finite", "ERROR after update 15 weights or optimizer state are not finite")) == 1


# Beside the training.


def assert_same_checkpoints(one: Path, other: Path) -> None:
    helpers.assert_same_run(one, other)
    assert helpers.checkpoints(one) == helpers.checkpoints(other) == [5, 10, 15, 20]
    for update in (5, 10, 15):
        assert helpers.different_tensors(one / f"model_{update}", other / f"model_{update}") == []
        assert helpers.counters(one / f"model_{update}") == helpers.counters(other / f"model_{update}")
        assert run_dir.damage(one / f"model_{update}") is None


def test_asynchronous_checkpoints_have_the_same_bits(one):
    assert_same_checkpoints(one.folder / "async", one.folder / "sync")
    assert one.results["async"][0]["digest"] == one.results["sync"][0]["digest"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_asynchronous_checkpoints_of_two_ranks_have_the_same_bits(two, layout):
    assert_same_checkpoints(two.folder / f"{layout} async", two.folder / f"{layout} sync")
    for rank in range(2):
        assert two.results[f"{layout} async"][rank]["digest"] == two.results[f"{layout} sync"][rank]["digest"]


def test_older_ones_go_only_when_a_newer_one_is_complete(one):
    (result,) = one.results["keep one"]
    assert result["seen"] == [[], [5], [10], [15]] and result["exit_code"] == 0
    assert helpers.checkpoints(one.folder / "keep one") == [20]
    assert helpers.different_tensors(one.folder / "keep one" / "model_20", one.folder / "sync" / "model_20") == []


def test_a_stop_waits_for_the_save_in_flight(one):
    """Update 10 is being written when the run is asked to stop in update 11: both end up saved."""
    (stopped,), (resumed,) = one.results["stopped"], one.results["stopped, resumed"]
    assert (stopped["exit_code"], resumed["exit_code"]) == (REQUEUE, 0)
    assert stopped["seen"] == [[], [5], [5, 10]]
    logged = [line.partition(" INFO ")[2] for line in lines(one, "stopped", " INFO ")]
    logged = [line for line in logged if not line.startswith("saved ")]
    # The resumed run, which logs here, too, may wait at its own end.
    saved = logged.index("asked to stop: saved update 12; launch the same command again to go on")
    # On a slow disk update 5 may still be in flight when update 10 is to be saved, which is another wait.
    assert logged[saved - 1] == "waiting for the checkpoint that is being written"
    assert helpers.checkpoints(one.folder / "stopped") == [5, 10, 12, 15, 20]
    helpers.assert_same_run(one.folder / "stopped", one.folder / "sync")


def test_killed_during_an_asynchronous_save(two, killed):
    assert (killed.checkpoints, killed.unfinished) == ([5], ["model_10.tmp"])
    assert f"resuming from {two.folder / 'killed' / 'model_5'}" in two.log
    helpers.assert_same_run(two.folder / "killed", two.folder / "ddp sync")


def test_a_thread_that_hangs_does_not_keep_a_crashed_process():
    body = """
import time
from peft_pretraining.checkpoint.writer import Background
Background().start(lambda: time.sleep(600))
raise ZeroDivisionError
"""
    done = subprocess.run([sys.executable, "-c", body], cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError")


# No room.


def assert_survived(runs: SimpleNamespace, name: str, reference: str) -> None:
    """The save of update 10 failed, which was said and counted; nothing else has changed."""
    run = runs.folder / name
    assert [result["exit_code"] for result in runs.results[name]] == [0] * len(runs.results[name])
    assert {result["failed_saves"] for result in runs.results[name]} == {1}
    (line,) = lines(runs, name, "not saved")
    assert "ERROR update 10 was not saved (" in line and "File too large" in line
    assert line.endswith("; the run goes on, and saves again at update 15")
    assert helpers.checkpoints(run) == [5, 15, 20]
    for update in (5, 15, 20):
        assert run_dir.damage(run / f"model_{update}") is None
        other = runs.folder / reference / f"model_{update}"
        assert helpers.different_tensors(run / f"model_{update}", other) == []
    helpers.assert_same_run(run, runs.folder / reference)
    counts = [record.get("failed_saves", 0) for record in helpers.records(run) if "loss" in record]
    assert counts[:10] == [0] * 10 and counts[15:] == [1] * 5 and counts == sorted(counts)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_full_disk_is_survived(one, how):
    """`metrics.jsonl`, too, cannot grow for five updates."""
    assert_survived(one, f"full {how}", "sync")
    assert len(lines(one, f"full {how}", "metrics.jsonl: File too large; records are kept until there is room")) == 1
    assert len(lines(one, f"full {how}", "metrics.jsonl: all records are written again")) == 1


@pytest.mark.parametrize("name, reference", [("one full sync", "ddp sync"), ("one full async", "fsdp sync")])
def test_one_rank_without_room_fails_the_save_of_both(two, name, reference):
    assert_survived(two, name, reference)
    assert "ERROR update 10 was not saved (rank 1: [Errno 27] File too large" in lines(two, name, "not saved")[0]


@pytest.mark.parametrize("name", ["full at the end", "full when stopped"])
def test_the_last_save_must_not_fail(one, name):
    (result,), update, kept = one.results[name], 9 if "stopped" in name else 20, 5 if "stopped" in name else 15
    run = one.folder / name
    assert (result["exit_code"], result["failed_saves"]) == (1, 2)
    assert [line.split("; ")[-1] for line in lines(one, name, f"update {update} was not saved (")] == [
        "trying once more in 0.1 s",
        "giving up",
    ]
    (line,) = lines(one, name, "could not be saved")
    assert (
        f"ERROR the last update {update} could not be saved in {run}; there is checkpoint {kept} to go on from" in line
    )
    assert helpers.checkpoints(run)[-1] == kept and helpers.unfinished(run) == []
    assert run_dir.damage(run / f"model_{kept}") is None
    assert len(lines(one, name, "metrics.jsonl: the last records are lost")) == 1
    assert not lines(one, name, "Traceback")


def test_the_last_save_is_tried_twice(one):
    (result,) = one.results["room again"]
    assert (result["exit_code"], result["failed_saves"]) == (0, 1)
    helpers.assert_same_run(one.folder / "room again", one.folder / "sync")


def test_all_ranks_give_up_on_the_last_save(two):
    assert [result["exit_code"] for result in two.results["one full at the end"]] == [1, 1]
    assert len(lines(two, "one full at the end", "ERROR the last update 20 could not be saved")) == 1
    assert helpers.checkpoints(two.folder / "one full at the end") == [5, 10, 15]


# What the ranks must agree on.


def test_both_ranks_pass_over_a_damaged_checkpoint(two):
    assert [result["exit_code"] for result in two.results["damaged"]] == [0, 0]
    run = two.folder / "damaged"
    assert two.log.count(f"WARNING skipped checkpoint {run / 'model_20'}: training_state/__1_0.distcp is damaged") == 1
    assert two.log.count(f"resuming from {run / 'model_15'}") == 1
    helpers.assert_same_run(run, two.folder / "fsdp sync")
    for rank in range(2):
        assert two.results["damaged"][rank]["digest"] == two.results["fsdp sync"][rank]["digest"]
    assert run_dir.damage(run / "model_20") is None  # written anew


@pytest.fixture
def sealed(tmp_path):
    """A checkpoint of two ranks before its completion: its folder, and what the ranks say of their files."""
    folder = tmp_path / "model_3.tmp"
    (folder / "training_state").mkdir(parents=True)
    tensors = [f"training_state/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")]
    for name in ("training_state.json", "config.json", "model.safetensors", *tensors):
        (folder / name).write_text(name)
    return folder, writer.seal(folder, run_dir.checkpoint_files(folder))


def test_files_that_the_main_process_cannot_see(sealed, tmp_path, monkeypatch):
    """Another node's, on a disk of its own."""
    folder, files = sealed
    (folder / "training_state" / "__1_0.distcp").unlink()
    monkeypatch.setattr(writer, "_SECONDS_TO_APPEAR", 0.0)
    with pytest.raises(writer.NotSaved, match=r"__1_0.distcp cannot be seen .* --save_dir on a file system"):
        writer.complete(folder, tmp_path / "model_3", files)
    assert helpers.checkpoints(tmp_path) == []


def test_files_that_appear_late(sealed, tmp_path):
    folder, files = sealed
    path = folder / "training_state" / "__1_0.distcp"
    whole = path.read_text()
    path.write_text(whole[:-3])
    late = threading.Thread(target=lambda: (time.sleep(0.3), path.write_text(whole)))
    late.start()
    writer.complete(folder, tmp_path / "model_3", files)
    late.join()
    assert run_dir.damage(tmp_path / "model_3") is None
