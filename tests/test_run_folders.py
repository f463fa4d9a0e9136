"""Folders of runs in which something is odd: foreign, damaged, hostile, removed, or in use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import helpers
import pytest
import torch
import yaml
from helpers import GALORE, RESUME, stop_after

from peft_pretraining import export
from peft_pretraining.checkpoint import checkpointer, contents, resume, run_dir, train_state
from peft_pretraining.checkpoint.folder_lock import LOCK_FILE, FolderLock
from peft_pretraining.config import recorded_precision


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return helpers.Undisturbed(tmp_path_factory)


@pytest.fixture
def finished(command, undisturbed, tmp_path):
    """A copy, which may be damaged, of a finished GaLore run with checkpoints of updates 10 and 20."""
    return Path(shutil.copytree(undisturbed(command, **GALORE), tmp_path / "run"))


def seal(folder: Path, **changes) -> None:
    """A manifest that fits whatever lies in a checkpoint."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            content = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    (folder / "manifest.json").write_text(json.dumps({"files": {**files, **changes}}))


def change_state(folder: Path, **changes) -> None:
    """Other counters in a checkpoint, and a manifest that fits."""
    path = folder / "training_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    seal(folder)


def resumed(command, capsys, **changes):
    """Exit code and log of GaLore's run, launched again."""
    capsys.readouterr()
    code = helpers.run([*command(**{**GALORE, **changes}), *RESUME])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, err


def skipped(err):
    return [line.split("skipped checkpoint ")[1] for line in err.splitlines() if "WARNING skipped checkpoint " in line]


# Checkpoints that are not this run's.


def test_a_checkpoint_of_another_seed_is_passed_over(command, undisturbed, finished, tmp_path, capsys):
    assert helpers.run(command(**GALORE, seed=7, save_dir=tmp_path / "other")) == 0
    shutil.rmtree(finished / "model_20")
    shutil.copytree(tmp_path / "other" / "model_20", finished / "model_20")
    code, err = resumed(command, capsys)
    assert code == 0
    (line,) = skipped(err)
    assert line.startswith(f"{finished / 'model_20'}: it belongs to another run (id ")
    helpers.assert_same_run(finished, undisturbed(command, **GALORE))


def test_another_update_than_the_name_says(command, undisturbed, finished, capsys):
    shutil.rmtree(finished / "model_20")
    shutil.copytree(finished / "model_10", finished / "model_15")
    code, err = resumed(command, capsys)
    assert code == 0 and skipped(err) == [f"{finished / 'model_15'}: it holds update 10, whatever its name says"]


@pytest.mark.parametrize(
    "other, reason",
    [
        ({"method": "full_rank"}, "it lacks optimizer."),
        ({"method": "lora", "rank": 4}, "it lacks optimizer."),
        ({**GALORE, "rank": 8}, "has the shape"),
        ({**GALORE, "dtype": "bfloat16"}, "is torch.bfloat16 instead of torch.float32: see --precision"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_loaded_falls_back(command, undisturbed, finished, tmp_path, capsys, other, reason):
    """Even where it says to be of this run."""
    assert helpers.run(command(**other, save_dir=tmp_path / "other", num_training_steps=10)) == 0
    record = json.loads((finished / "model_20" / "training_state.json").read_text())["run"]
    shutil.rmtree(finished / "model_20")
    shutil.copytree(tmp_path / "other" / "model_10", finished / "model_20")
    change_state(finished / "model_20", run=record, update_step=20)
    code, err = resumed(command, capsys)
    assert code == 0
    (line,) = skipped(err)
    assert reason in line
    helpers.assert_same_run(finished, undisturbed(command, **GALORE))


def test_weights_that_would_be_left_out_are_noticed(finished):
    """torch.distributed.checkpoint loads what is asked for, and passes over the rest."""
    stored = helpers.tensors(finished / "model_20")
    model = {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}
    described = contents.describe(finished / "model_20")
    contents.compare(described, {"model": model, "optimizer": {}}, {f"model.{name}" for name in model})
    model.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"it holds model\.lm_head\.weight, which this run has not"):
        contents.compare(described, {"model": model, "optimizer": {}}, {f"model.{name}" for name in model})


def test_nothing_that_can_be_loaded(command, finished, undisturbed, capsys):
    for update in (10, 20):
        change_state(finished / f"model_{update}", method=3)
        (finished / f"model_{update}" / "training_state" / "__0_0.distcp").write_bytes(b"no tensors")
        seal(finished / f"model_{update}")
    code, err = resumed(command, capsys)
    assert code == 2 and len([line for line in err.splitlines() if line.startswith("error:")]) == 3
    assert "every checkpoint is damaged; --allow_restart True starts over" in err
    code, err = resumed(command, capsys, allow_restart=True)  # with none of what had been loaded by then
    assert code == 0
    helpers.assert_same_run(finished, undisturbed(command, **GALORE))


def test_a_newer_format_is_refused(command, finished, tmp_path, capsys):
    """Going on from the one before would write over what a newer version has done."""
    change_state(finished / "model_20", format=2)
    before = helpers.contents(finished)
    code, err = resumed(command, capsys)
    assert code == 2
    assert "checkpoint format 2; this version reads up to 1): update the code" in err
    assert helpers.contents(finished) == before
    argv = command(**GALORE, save_dir=tmp_path / "new", resume_from=finished / "model_20")
    assert helpers.run(argv) == 2 and "checkpoint format 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"update_step": "20"},
        {"update_step": True},
        {"data_position": 10**30},
        {"spike_statistics": {"loss": [1, 2]}},
        {"rewinds": 3},
        {"run": "mine"},
        {"run": {"id": 5, "identity": {}, "settings": {}}},
        {"method": None},
        {"format": "new"},
    ],
    ids=str,
)
def test_counters_of_another_type_fall_back(command, finished, capsys, changes):
    change_state(finished / "model_20", **changes)
    code, err = resumed(command, capsys)
    assert (code == 0 and len(skipped(err)) == 1 and "training_state.json" in skipped(err)[0]) or "method" in changes


# Manifests.


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "training_state.json", "training_state/.metadata", "training_state/*.distcp"],
)
def test_a_manifest_must_list_what_a_checkpoint_consists_of(finished, name):
    folder = finished / "model_20"
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = [file for file in manifest["files"] if Path(file).match(name)]
    assert listed
    for file in listed:
        del manifest["files"][file]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run_dir.damage(folder) == f"manifest.json does not list {name}"


def test_a_manifest_that_lists_nothing(finished):
    (finished / "model_20" / "manifest.json").write_text('{"files": {}}')
    assert run_dir.damage(finished / "model_20") == "manifest.json does not list config.json"


def test_weights_in_parts(finished):
    """As `save_pretrained` writes large models."""
    folder = finished / "model_20"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    seal(folder)
    assert run_dir.damage(folder) == "manifest.json does not list model-00002-of-00002.safetensors"
    (folder / "model-00002-of-00002.safetensors").write_text("")
    seal(folder)
    assert run_dir.damage(folder) is None


@pytest.mark.parametrize(
    "name", ["../outside", "{absolute}", "training_state/../../outside", "./outside", "a//b", "link", "folder/file"]
)
def test_files_outside_the_checkpoint_are_refused(finished, name):
    folder, outside = finished / "model_20", finished / "outside"
    outside.write_text("x")
    name = name.format(absolute=outside)
    (folder / "link").symlink_to(outside)
    (folder / "folder").symlink_to(finished)
    if name == "folder/file":
        (finished / "file").write_text("x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"files": {**manifest["files"], name: entry}}))
    assert run_dir.damage(folder) in (
        f"{name} lies outside the checkpoint",
        f"{name} is a link, which may lead out of the checkpoint",
    )


ENTRY = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "content",
    [
        *(b"[" * 100_000, b"\xff\xfe", b'{"files": {"a": {"bytes": "1", "sha256": "x"}}}', b'{"files": [["a", 1]]}'),
        *(json.dumps({"files": {"a": {**ENTRY, "bytes": size}}}).encode() for size in (True, -1, 1.0, None, [], {})),
        *(json.dumps({"files": {"a": {**ENTRY, "sha256": text}}}).encode() for text in (1, None, [], {})),
        *(json.dumps({"files": {name: ENTRY}}).encode() for name in ("\0", "a" * 5000, "\ud800", "", "training_state")),
        b'{"files": {"a": {"bytes": 1' + b"0" * 5000 + b', "sha256": "x"}}}',
    ],
    ids=range(20),
)
def test_no_manifest_ends_in_an_exception(finished, content):
    (finished / "model_20" / "manifest.json").write_bytes(content)
    reason = run_dir.damage(finished / "model_20")
    assert reason and "\n" not in reason


@pytest.mark.parametrize("restart", [False, True])
def test_a_good_run_is_not_started_over_for_another_setting(finished, command, capsys, monkeypatch, restart):
    """It is whole: who asks for a new start means damaged ones. Nothing looks at settings before the tensors here."""
    monkeypatch.setattr(recorded_precision, "keep", lambda config, given, problems: config)
    before = {path: path.read_bytes() for path in finished.glob("model_*/**/*") if path.is_file()}
    code, err = resumed(command, capsys, dtype="bfloat16", allow_restart=restart)
    assert code == 2 and "is torch.float32 instead of torch.bfloat16: see --precision" in err
    assert "no checkpoint fits these settings" in err
    assert "starts over" not in err
    assert {path: path.read_bytes() for path in finished.glob("model_*/**/*") if path.is_file()} == before


@pytest.mark.parametrize("restart", [False, True])
def test_whole_checkpoints_of_other_settings_are_not_started_over(command, tmp_path, capsys, restart):
    sgd = {"method": "full_rank", "optimizer": "sgd", "save_dir": tmp_path / "sgd", "num_training_steps": 10}
    assert helpers.run(command(**sgd, momentum=0)) == 0
    capsys.readouterr()
    again = [*command(**{**sgd, "num_training_steps": 12}, momentum=0.9, allow_restart=restart), *RESUME]
    code, err = helpers.run(again), capsys.readouterr().err
    assert code == 2 and "no checkpoint fits these settings" in err and "starts over" not in err
    assert helpers.checkpoints(tmp_path / "sgd") == [10]


# config.yaml


@pytest.mark.parametrize("harm", [lambda path: path.write_text(""), lambda path: path.unlink()], ids=["empty", "gone"])
def test_a_lost_config_switches_no_check_off(finished, command, capsys, harm):
    run_id = yaml.safe_load((finished / "config.yaml").read_text())["run"]["id"]
    shutil.rmtree(finished / "model_20")
    harm(finished / "config.yaml")
    code, err = resumed(command, capsys, max_length=32)
    assert code == 2 and "holds another run: it was begun with max_length 64 instead of 32" in err
    code, err = resumed(command, capsys)
    assert code == 0 and "the run's settings are taken from model_10" in err
    assert yaml.safe_load((finished / "config.yaml").read_text())["run"] == {"id": run_id, "first_update": 0}


def test_a_config_that_grows_without_bounds(finished, command, capsys):
    levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (finished / "config.yaml").write_text("\n".join(levels))
    code, err = resumed(command, capsys)
    assert code == 2 and "config.yaml cannot be read (" in err


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "wandb_run.json", "metrics.damaged.jsonl", "metrics.undone.jsonl"]
)
def test_a_folder_in_place_of_a_file(finished, command, capsys, name):
    (finished / name).unlink(missing_ok=True)
    (finished / name).mkdir()
    code, err = resumed(command, capsys)
    assert code == 2 and f"{finished / name} is not a file" in err


@pytest.mark.parametrize("name", ["metrics.damaged.jsonl", "metrics.undone.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_appended_through_a_link_or_to_a_pipe(finished, command, tmp_path, capsys, name, kind):
    elsewhere = tmp_path / "elsewhere"
    os.mkfifo(finished / name) if kind == "pipe" else (finished / name).symlink_to(elsewhere)
    code, err = resumed(command, capsys)
    assert code == 2 and f"{finished / name} is not a file, or is a link" in err and not elsewhere.exists()


# What changes the function that a checkpoint computes.


def test_golore_adapters_scale_is_part_of_the_run(command, tmp_path, capsys):
    settings = {"method": "golore_adapter", "rank": 4, "update_proj_gap": 3, "rand_ratio": 0.5}
    stop_after(7, command(**settings, scale=0.5))
    capsys.readouterr()
    assert helpers.run([*command(**settings, scale=0.25), *RESUME]) == 2
    assert "holds another run: it was begun with scale 0.5 instead of 0.25" in capsys.readouterr().err
    # Its export is that of the scale it was trained with, whatever the folder says.
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("scale: 0.5", "scale: 0.25"))
    saved = tmp_path / "run" / "model_7"
    exported = export.merged_model(saved, None).state_dict()
    for name, expected in helpers.tensors(saved).items():
        if name.startswith("exported."):
            torch.testing.assert_close(exported[name.removeprefix("exported.")], expected)


def test_an_identity_may_grow(command, finished):
    """Runs that were begun before a setting became part of it are compared by their settings."""
    record = resume.RunRecord("id", 0, {"rank": 4}, {"rank": 4, "scale": 0.5})
    assert resume.differences(record, {"rank": 4, "scale": 0.5, "new": 1}) == []
    assert resume.differences(record, {"rank": 4, "scale": 0.25}) == ["scale 0.5 instead of 0.25"]
    assert resume.differences(record, {"scale": 0.5}) == []  # what the method no longer reads


# Leftovers.


@pytest.mark.parametrize("kind", ["file", "link", "folder", "dangling link"])
@pytest.mark.parametrize("suffix", [".tmp", ".replaced"])
def test_leftovers_of_any_type_are_removed(command, undisturbed, tmp_path, kind, suffix):
    """When the run begins, and when they come later."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("x")

    def leave(update):
        path = tmp_path / "run" / f"model_{update}{suffix}"
        {"file": path.touch, "folder": path.mkdir}.get(
            kind, lambda: path.symlink_to(kept if kind == "link" else tmp_path / "nowhere")
        )()

    stop_after(4, command(**GALORE))
    if kind != "folder" or suffix == ".tmp":
        leave(10)
    with helpers.before_update(15, lambda: leave(20)):
        assert helpers.run([*command(**GALORE), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **GALORE))
    assert (kept / "precious").read_text() == "x"


def test_a_file_that_has_a_checkpoints_name(command, undisturbed, tmp_path):
    stop_after(4, command(**GALORE))
    (tmp_path / "run" / "model_10").write_text("x")
    (tmp_path / "run" / "model_20").symlink_to(tmp_path / "nowhere")
    assert helpers.run([*command(**GALORE), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **GALORE))


def test_a_checkpoint_that_was_being_replaced_gets_its_name_back(finished):
    """The process died between two renames."""
    (finished / "model_20").rename(finished / "model_20.replaced")
    shutil.copytree(finished / "model_10", finished / "model_20.tmp")
    run_dir.remove_leftovers(finished)
    assert helpers.checkpoints(finished) == [10, 20] and helpers.unfinished(finished) == []


# Finished, or further than asked.


def test_a_finished_run_says_so(finished, command, capsys):
    code, err = resumed(command, capsys)
    assert code == 0
    assert f"already finished: {finished / 'model_20'} has done all 20 updates; nothing to do" in err


def test_damage_to_a_finished_run_is_noticed(finished, command, undisturbed, capsys):
    helpers.flip_byte(finished / "model_20" / "model.safetensors")
    code, err = resumed(command, capsys)
    assert code == 0 and len(skipped(err)) == 1 and "already finished" not in err
    helpers.assert_same_run(finished, undisturbed(command, **GALORE))


def test_fewer_updates_than_are_done(finished, command, capsys):
    code, err = resumed(command, capsys, num_training_steps=12)
    assert code == 0
    assert (
        f"--num_training_steps gives 12 updates, but {finished / 'model_20'} has done 20: nothing is left to do" in err
    )


# Who holds the folder.


def test_a_folder_in_use_is_refused(finished, command, capsys):
    before = helpers.contents(finished)
    with FolderLock(finished):
        code, err = resumed(command, capsys)
    (error,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert f"--save_dir {finished} is in use by process {os.getpid()} on {socket.gethostname()}, since 20" in error
    assert helpers.contents(finished) == before


def test_a_run_holds_its_folder(command, tmp_path, capsys):
    codes = []
    with helpers.before_update(3, lambda: codes.append(helpers.run([*command(), *RESUME]))):
        assert helpers.run(command()) == 0
    assert codes == [2] and "is in use by process" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob(".lock*"))  # given back


def test_two_runs_that_begin_at_once(command, tmp_path, monkeypatch, capsys):
    """Neither has seen the other's folder when it was checked."""
    from peft_pretraining.training import build

    open_data = build.open_data

    def slower(launch, group):
        with monkeypatch.context() as patch:
            patch.setattr(build, "open_data", open_data)
            assert helpers.run(command(num_training_steps=2)) == 0
        return open_data(launch, group)

    monkeypatch.setattr(build, "open_data", slower)
    assert helpers.run(command(num_training_steps=2)) == 2
    assert "another run has begun there meanwhile" in capsys.readouterr().err
    assert helpers.checkpoints(tmp_path / "run") == [2]


def test_a_folder_that_only_a_dead_run_marked_is_new(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock.owner").write_text("{}")
    assert helpers.run(command(num_training_steps=2)) == 0


@pytest.mark.parametrize("how", ["removed", "made anew", "taken by another"])
def test_a_folder_that_is_lost_while_training(command, tmp_path, capsys, how):
    run = tmp_path / "run"

    def lose():
        if how == "taken by another":
            (run / LOCK_FILE).unlink()
        else:
            shutil.rmtree(run)
        if how == "made anew":
            run.mkdir()

    with helpers.before_update(12, lose):
        assert helpers.run(command()) == 1
    err = capsys.readouterr().err
    (error,) = [line for line in err.splitlines() if "ERROR" in line and "no longer this run's folder" in line]
    assert str(run) in error and "Traceback" not in err
    assert not run.exists() if how == "removed" else helpers.checkpoints(run) == ([] if how == "made anew" else [10])


def test_metrics_that_are_removed_while_training(command, tmp_path, capsys):
    with helpers.before_update(12, (lambda: (tmp_path / "run" / "metrics.jsonl").unlink())):
        assert helpers.run(command()) == 0
    assert "metrics.jsonl was removed or replaced: records are appended" in capsys.readouterr().err
    assert [item[0] for item in helpers.updates(tmp_path / "run")] == list(range(13, 21))


def test_a_folder_without_permission(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert helpers.run([*command(), *RESUME]) == 2
    assert f"--save_dir {tmp_path / 'run'}: cannot be used (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "dangling"])
def test_a_name_that_no_folder_can_have(command, tmp_path, capsys, name):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert helpers.run(command(save_dir=tmp_path / name)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "--save_dir" in errors[0]


def test_a_warm_start_from_odd_counters(command, finished, tmp_path, capsys):
    (finished / "model_20" / "training_state.json").write_text('{"update_step": "x"}')
    argv = command(save_dir=tmp_path / "new", warmed_up_model=finished / "model_20")
    assert helpers.run(argv) == 2
    assert "--warmed_up_model" in capsys.readouterr().err


def test_state_and_format_of_what_is_written(finished):
    counters = train_state.read_counters(finished / "model_20")
    assert counters["format"] == train_state.FORMAT == 1
    record = resume.record_of(counters)
    assert record.id == yaml.safe_load((finished / "config.yaml").read_text())["run"]["id"]
    assert record.settings["rank"] == 4 and record.identity["method"] == "galore" and record.first_update == 0
    assert checkpointer.versions() == counters["versions"]
