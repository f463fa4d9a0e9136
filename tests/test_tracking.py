"""What a run leaves to be read: `metrics.jsonl`, `config.yaml`, wandb's records, the log."""

from __future__ import annotations

import json
import math
import platform
import re
import struct
import sys
import time

import helpers
import pytest
import torch
import yaml
from conftest import BLOCK
from helpers import GALORE, METHODS, RESUME, stop_after

from peft_pretraining.config import Config
from peft_pretraining.training import build, profiling, tracking
from peft_pretraining.training.dashboard import named

UPDATE_FIELDS = {
    **{"update_step": int, "loss": float, "lr": float, "grad_norm": float, "tokens_seen": int},
    **{"throughput_tokens": float, "step_time": float, "peak_memory_bytes": int},
}
FIRST_REFRESH_FIELDS = {"captured_energy_mean": float, "captured_energy_min": float, "refreshed_layers": int}
REFRESH_FIELDS = {**FIRST_REFRESH_FIELDS, "basis_overlap_mean": float, "basis_overlap_min": float}
EVALUATION_FIELDS = {
    **{"update_step": int, "tokens_seen": int, "final_eval_loss": float, "final_eval_perplexity": float},
    **{"final_eval_tokens": int, "optimizer_state_bytes": int},
}


def types(record):
    return {name: type(value) for name, value in record.items()}


# metrics.jsonl


@pytest.mark.parametrize("method", METHODS)
def test_metrics(command, tmp_path, method):
    assert helpers.run(command(**METHODS[method], eval_every=8)) == 0
    records = helpers.records(tmp_path / "run")
    updates = [record for record in records if "loss" in record]
    evaluated = [record for record in records if "loss" not in record]
    refreshes = {1: FIRST_REFRESH_FIELDS, 6: REFRESH_FIELDS, 11: REFRESH_FIELDS, 16: REFRESH_FIELDS}
    for record in updates:
        further = refreshes.get(record["update_step"], {}) if method == "galore" else {}
        assert types(record) == {**UPDATE_FIELDS, **further}
    assert [types(record) for record in evaluated] == [EVALUATION_FIELDS] * 4
    assert [record["update_step"] for record in updates] == list(range(1, 21))
    assert [record["update_step"] for record in evaluated] == [0, 8, 16, 20]  # before, at intervals, at the end
    assert [record["update_step"] for record in records] == sorted(record["update_step"] for record in records)
    for record in records:
        assert all(math.isfinite(value) for value in record.values())
        assert record["tokens_seen"] == record["update_step"] * 8 * BLOCK
    for record in updates:
        assert record["throughput_tokens"] == pytest.approx(8 * BLOCK / record["step_time"])
        assert record["grad_norm"] > 0 and record["peak_memory_bytes"] > 50e6
    for record in evaluated:
        assert record["final_eval_perplexity"] == pytest.approx(math.exp(record["final_eval_loss"]))
        assert record["final_eval_tokens"] == 20 * (BLOCK - 1)
    # It learns: from a uniform guess over 128 tokens towards one out of three.
    losses = [record["final_eval_loss"] for record in evaluated]
    assert losses[0] == pytest.approx(math.log(128), abs=0.05)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 3.5
    # Two moments of every weight, but only their projection with GaLore; and the bases.
    assert (evaluated[0]["optimizer_state_bytes"] < 150_000) == (method == "galore")


def test_evaluation_reads_as_many_tokens_as_asked_for(command, tmp_path):
    assert helpers.run(command(num_training_steps=2, eval_tokens=7 * BLOCK)) == 0
    assert {r["final_eval_tokens"] for r in helpers.records(tmp_path / "run") if "loss" not in r} == {7 * (BLOCK - 1)}


def test_an_evaluation_in_between_changes_no_update(command, tmp_path):
    for name, every in (("run", 10), ("often", 3)):
        assert helpers.run(command(**GALORE, eval_every=every, save_dir=tmp_path / name)) == 0
    assert helpers.updates(tmp_path / "run") == helpers.updates(tmp_path / "often")


def test_records_that_a_resumed_run_makes_again_are_forgotten(command, tmp_path):
    stop_after(3, command())
    path = tmp_path / "run" / "metrics.jsonl"
    kept = path.read_text()
    path.write_text(kept + '{"update_step": 4, "loss": 1.0}\n{"update_step": 20, "final_eval_loss": 1.0}\n{"update_st')
    seen = []
    with helpers.before_update(3, lambda: seen.append(path.read_text())):
        assert helpers.run([*command(), *RESUME]) == 0
    assert seen == [kept]
    assert [item[0] for item in helpers.updates(tmp_path / "run")] == list(range(1, 21))


# config.yaml


def test_config_yaml(command, tmp_path):
    changes = {**GALORE, "tags": "one,two", "skip_batches": "15", "num_training_steps": 2}
    assert helpers.run(command(**changes)) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert set(written) == {"settings", "identity", "versions", "run", "parameter_groups"}
    assert len(written["run"]["id"]) == 16 and written["run"]["first_update"] == 0
    settings = written["settings"]
    assert set(settings) == set(Config.from_settings({"method": "galore"}).settings())
    assert {name: settings[name] for name in ("method", "rank", "update_proj_gap", "lr", "num_training_steps")} == {
        **{"method": "galore", "rank": 4, "update_proj_gap": 5, "lr": 1e-2, "num_training_steps": 2},
    }
    # What was not given, as it was derived or by default.
    assert {name: settings[name] for name in ("gradient_accumulation", "world_size", "max_length", "seed")} == {
        **{"gradient_accumulation": 2, "world_size": 1, "max_length": BLOCK, "seed": 42},
    }
    assert settings["tags"] == ["one", "two"] and settings["skip_batches"] == [15]
    assert settings["adam_eps"] == 1e-6  # GaLore's default
    import transformers

    assert written["versions"] == {
        **{"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }


def test_config_yaml_that_cannot_be_read(command, tmp_path, capsys):
    stop_after(3, command())
    for content in ("settings: [", "settings: 3\n", "just text\n"):
        (tmp_path / "run" / "config.yaml").write_text(content)
        assert helpers.run([*command(), *RESUME]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and f"{tmp_path / 'run' / 'config.yaml'} cannot be read" in errors[0]


# wandb


def wandb_records(folder):
    """Every record of the one .wandb file in a folder: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    data, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (rest := 32768 - position % 32768) < 7:  # no header fits into the rest of the block
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def wandb_history(folder):
    """What `wandb.log` was given, without wandb's own entries."""
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            yield {name: value for name, value in items.items() if not name.startswith("_")}


def complete_history(folder, length):
    """`wandb_history`, once it has so many entries: wandb's own process may still be writing the file."""
    for _ in range(300):
        if len(history := list(wandb_history(folder))) >= length:
            return history
        time.sleep(0.1)
    return history


@pytest.fixture
def offline(monkeypatch):
    import wandb

    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_NAME", "WANDB_TAGS", "WANDB_NOTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def test_wandb_gets_the_same_numbers_and_keeps_its_run(command, tmp_path, offline):
    argv = command(**GALORE, wandb_project="bases", name="first", tags="galore,small", comment="a note")
    stop_after(13, argv)
    run_id = json.loads((tmp_path / "run" / "wandb_run.json").read_text())["id"]
    (first,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    records = [named(record, 20) for record in helpers.records(tmp_path / "run")]
    assert complete_history(first, len(records)) == records

    time.sleep(1.1)  # wandb names its folders by the second in which a run begins
    assert helpers.run([*argv, *RESUME]) == 0
    (second,) = set((tmp_path / "run" / "wandb").glob("offline-run-*")) - {first}
    before, records = list(wandb_history(first)), [named(record, 20) for record in helpers.records(tmp_path / "run")]
    assert before + complete_history(second, len(records) - len(before)) == records
    assert json.loads((tmp_path / "run" / "wandb_run.json").read_text())["id"] == run_id
    for folder in (first, second):
        (run,) = [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"][:1]
        assert (run.run_id, run.project, run.display_name, run.notes) == (run_id, "bases", "first", "a note")
        assert (run.run_group, run.job_type, list(run.tags)) == ("llama-galore", "galore", ["galore", "small"])
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (config["method"], config["rank"], config["num_training_steps"]) == ("galore", 4, 20)
        assert (config["model"], config["model_shape"]["hidden_size"], config["device"]) == ("llama", 32, "cpu")
        assert config["versions"]["torch"] == torch.__version__ and len(config["run_id"]) == 16
        regular, projected = config["parameter_groups"]
        assert regular == "embedding 4.1k, head 4.1k, norms 160: adamw, rate 0.01, weight decay 0"
        assert projected == "matrices 20.5k: adamw in rank 4, rate 0.01, weight decay 0"


def test_wandb_defaults(command, tmp_path, offline, monkeypatch):
    import wandb

    begun, watched = [], []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: begun.append(settings) or init(**settings))
    monkeypatch.setattr(wandb.Run, "watch", lambda self, model: watched.append(model))
    flags = ["--with_tracking", "--wandb_watch"]
    assert helpers.run([*command(num_training_steps=2), *flags]) == 0
    assert (begun[0]["project"], begun[0]["name"]) == ("peft_pretraining", "full_rank lr=0.01 seed=42")
    assert len(watched) == 1 and sum(1 for _ in watched[0].parameters()) > 0


def test_wandb_is_not_touched_unless_asked_for(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    assert helpers.run(command(num_training_steps=2, tags="a", name="b")) == 0
    assert not [path for path in (tmp_path / "run").iterdir() if "wandb" in path.name]


# The log.


def test_only_the_main_process_speaks(capsys):
    for is_main, lines in ((True, 3), (False, 1)):
        tracking.start_logging(is_main)
        tracking.log.info("begun")
        tracking.log.warning("odd")
        tracking.log.error("failed")
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_log_says_what_runs(command, tmp_path, capsys):
    assert helpers.run(command(**GALORE)) == 0
    err = capsys.readouterr().err
    assert f"run folder {tmp_path / 'run'}" in err
    assert "galore on 1 x cpu, torch.float32: 0.03M parameters" in err
    assert "20 updates of 8 x 64 tokens (batch 4 x accumulation 2 x 1 processes) from 200 samples" in err
    assert "update 10: validation loss" in err


def test_no_save_dir_given(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert helpers.run(command(save_dir=None, num_training_steps=2)) == 0
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name.startswith("llama-full_rank-20") and helpers.checkpoints(folder) == [2]
    assert f"run folder checkpoints/{folder.name}" in capsys.readouterr().err


# Peak memory


def test_on_cuda_the_peak_is_the_runs_own_and_what_was_reserved_stands_beside_it(monkeypatch):
    device, reset = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {device: 3 * 2**30}.get)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", {device: 4 * 2**30}.get)
    profiling.reset_peak_memory(device)
    assert reset == [device]
    assert profiling.peak_memory(device) == {"peak_memory_bytes": 3 * 2**30, "peak_reserved_bytes": 4 * 2**30}
    assert profiling.describe_peak(device) == "peak memory 3.00 GiB allocated, 4.00 GiB reserved"


def test_counting_begins_when_all_is_built(command, monkeypatch, capsys):
    devices, made = [], []
    monkeypatch.setattr(build, "assemble", lambda *given, whole=build.assemble: (whole(*given), made.append(1))[0])
    monkeypatch.setattr(build, "reset_peak_memory", lambda device: devices.append((device, len(made))))
    assert helpers.run(command(num_training_steps=2)) == 0
    assert devices == [(torch.device("cpu"), 1)]
    assert re.search(r"peak memory \d+\.\d\d GiB resident, building included", capsys.readouterr().err)
