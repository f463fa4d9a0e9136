"""Fine-tuning in a folder: sealed checkpoints, one set of settings, one owner, and nothing done twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from finetune_helpers import glue_flags, rows, write_bert, write_rows
from safetensors.torch import load_file, save_file

import run_glue
from peft_pretraining.checkpoint.folder_lock import FolderLock
from peft_pretraining.finetune import checkpoints
from peft_pretraining.finetune.checkpoints import CheckpointUnusable
from peft_pretraining.finetune.trainer import MethodTrainer
from peft_pretraining.flags import ConfigError


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A function: the command line of a small run."""
    folder = tmp_path_factory.mktemp("inputs")
    common = {
        **{"model_name_or_path": write_bert(folder / "bert"), "task_name": "sst2", "rank": 4, "update_proj_gap": 3},
        **{"train_file": write_rows(folder / "train.jsonl", rows("sst2", 40, seed=1)), "method": "galore"},
        **{"validation_file": write_rows(folder / "validation.jsonl", rows("sst2", 16, seed=2)), "use_cpu": True},
        **{"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "per_device_train_batch_size": 4},
        **{"learning_rate": 1e-2, "max_length": 16, "disable_tqdm": True},
    }
    return lambda output_dir, **changes: glue_flags(**{**common, "output_dir": output_dir, **changes})


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_glue.main(flags(folder)) == 0
    return folder


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy as a machine leaves it that goes down after update 5: without the final model and the results."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("all_results.json", "model.safetensors", "manifest.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def run(flags, capsys):
    """A function: exit code, and what was said of it, of a run."""

    def call(folder, **changes):
        capsys.readouterr()
        code = run_glue.main(flags(folder, **changes))
        return code, capsys.readouterr().err

    return call


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def as_older(folder: Path) -> None:
    """As it was before there were manifests and settings."""
    for path in (*folder.rglob("manifest.json"), *folder.rglob("run.json")):
        path.unlink()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "method_state.json",
)


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", [*FILES, "run.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(file, harm, unfinished, caplog):
    settings = checkpoints.read_settings(unfinished)
    harm(unfinished / "checkpoint-5" / file)
    assert checkpoints.newest_good(unfinished, settings, False, False) == unfinished / "checkpoint-4"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"skipped checkpoint {unfinished / 'checkpoint-5'}: ")
    assert file in line or file == "manifest.json"  # any file may be the one whose checksum is no longer right


def test_a_run_goes_on_from_before_the_damage(run, unfinished, finished):
    flip(unfinished / "checkpoint-5" / "optimizer.pt")
    cut(unfinished / "checkpoint-4" / "model.safetensors")
    code, said = run(unfinished)
    assert code == 0 and same_weights(unfinished, finished)
    assert "skipped checkpoint" in said and "checkpoint-5: optimizer.pt is damaged" in said
    assert f"going on from {unfinished / 'checkpoint-2'}" in said
    assert checkpoints.unusable(unfinished / "checkpoint-5", False) is None  # sealed anew


def test_without_a_good_checkpoint_nothing_begins(run, unfinished):
    for folder in unfinished.glob("checkpoint-*"):
        cut(folder / "optimizer.pt")
    code, said = run(unfinished)
    assert code == 2 and said.count("error: skipped checkpoint") == 3
    assert said.rstrip().endswith("no checkpoint is good; --overwrite_output_dir starts over")


def test_a_checkpoint_that_was_never_completed_is_none(run, unfinished, finished):
    for folder in unfinished.glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    code, said = run(unfinished)
    assert code == 0 and said.count("it was never completed") == 3 and same_weights(unfinished, finished)


def test_manifests_that_list_too_little(unfinished):
    folder, settings = unfinished / "checkpoint-5", checkpoints.read_settings(unfinished)
    checkpoints.seal(folder, ["trainer_state.json"])
    assert checkpoints.unusable(folder, False) == "method_state.json is missing"
    (folder / "manifest.json").write_text('{"files": {}}')
    assert checkpoints.unusable(folder, False) is not None
    with pytest.raises(ConfigError, match=r"--resume_from_checkpoint .*checkpoint-5: "):
        checkpoints.named(folder, settings, False)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_passed_over(run, unfinished, flags, tmp_path):
    assert run_glue.main(flags(tmp_path / "other", seed=7)) == 0
    shutil.rmtree(unfinished / "checkpoint-5")
    shutil.copytree(tmp_path / "other" / "checkpoint-5", unfinished / "checkpoint-5")
    code, said = run(unfinished)
    assert code == 0 and "checkpoint-5: it was begun with seed 7 instead of 42" in said
    code, said = run(tmp_path / "new", resume_from_checkpoint=tmp_path / "other" / "checkpoint-5")
    assert code == 2 and said.count("error: ") == 1 and "it was begun with seed 7 instead of 42" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_what_was_written_before_manifests_is_read_and_it_is_said(run, unfinished, finished, tmp_path):
    as_older(unfinished)
    cut(unfinished / "checkpoint-5" / "optimizer.pt")
    (unfinished / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "unheard": 1}')
    code, said = run(unfinished)
    assert code == 0 and same_weights(unfinished, finished)
    assert said.count("was written before there were manifests") == 3 and said.count("skipped checkpoint") == 2
    older = tmp_path / "older"
    shutil.copytree(finished, older)
    as_older(older)
    code, said = run(older)
    assert code == 0 and "written before settings were kept" in said and "is finished" in said
    code, said = run(older, learning_rate=0.2)
    assert code == 2 and "learning_rate 0.01 instead of 0.2" in said


def test_a_finished_run_is_left_alone(run, finished, capsys, flags):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in finished.rglob("*")}
    results = json.loads((finished / "all_results.json").read_text())
    code, said = run(finished, save_steps=3, logging_steps=1)
    assert code == 0 and f"{finished} is finished: nothing is done" in said
    assert run_glue.main(flags(finished)) == 0
    assert f"eval_accuracy {results['eval_accuracy']:.4f}" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in finished.rglob("*")}


@pytest.mark.parametrize("name", ["all_results.json", "model.safetensors", "run.json"])
def test_a_finished_run_that_is_damaged_is_finished_again(name, run, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    cut(folder / name)
    code, said = run(folder)
    assert code == 0 and f"was finished, but {name}" in said and "all 5 updates are done" in said
    assert same_weights(folder, finished)
    assert checkpoints.trainer_state(folder / "checkpoint-5")["global_step"] == 5


CHANGES = {
    "learning_rate": ({"learning_rate": 0.02}, "learning_rate 0.01 instead of 0.02"),
    "scale": ({"scale": 3}, "scale 1.0 instead of 3.0"),
    "gap": ({"update_proj_gap": 4}, "update_proj_gap 3 instead of 4"),
    "decay": ({"weight_decay": 0.1}, "weight_decay 0.0 instead of 0.1"),
    "length": ({"max_steps": 4}, "max_steps 5 instead of 4"),
    "batch": ({"per_device_train_batch_size": 2}, "rows in an update 4 instead of 2"),
    "limit": ({"max_train_samples": 20}, "max_train_samples None instead of 20"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.0 instead of 0.1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused(name, run, finished, unfinished):
    changes, told = CHANGES[name]
    for folder in (finished, unfinished):
        code, said = run(folder, **changes)
        assert code == 2 and said.count("error: ") == 1
        assert f"error: --output_dir {folder} holds a run that was begun with {told}: " in said
    (unfinished / "run.json").unlink()  # then each checkpoint says it
    code, said = run(unfinished, **changes)
    assert code == 2 and told in said


@pytest.mark.parametrize("method, name, old", [("lora", "lora_alpha", "32.0"), ("golore_adapter", "scale", "1.0")])
def test_other_scales_of_factors_are_refused(method, name, old, run, tmp_path):
    own = {"method": method, "update_proj_gap": None, "max_steps": 2}
    assert run(tmp_path / "run", **own)[0] == 0
    code, said = run(tmp_path / "run", **own, **{name: 7})
    assert code == 2 and f"{name} {old} instead of 7.0" in said


def test_rows_and_models_are_known_by_their_content(run, finished, flags, tmp_path):
    words = dict(zip(flags(finished)[::2], flags(finished)[1::2], strict=True))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(words["--train_file"], moved)
    shutil.copytree(words["--model_name_or_path"], tmp_path / "bert")
    assert run(finished, train_file=moved, model_name_or_path=tmp_path / "bert")[0] == 0
    write_rows(moved, rows("sst2", 40, seed=3))
    code, said = run(finished, train_file=moved)
    assert code == 2 and "train_file" in said
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    tensors["encoder.layer.0.attention.self.query.weight"] += 1
    save_file(tensors, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    code, said = run(finished, model_name_or_path=tmp_path / "bert")
    assert code == 2 and "model_name_or_path" in said


def test_starting_over(run, unfinished, flags):
    code, _ = run(unfinished, overwrite_output_dir=True, max_steps=1, save_strategy="no")
    assert code == 0 and not list(unfinished.glob("checkpoint-*"))
    assert json.loads((unfinished / "all_results.json").read_text())["train_steps"] == 1


@pytest.mark.slow
def test_seeds_are_runs_of_their_own(run, tmp_path):
    folder = tmp_path / "run"
    own = {"max_steps": 2, "save_strategy": "no"}
    assert run(folder, seeds="1,2", **own)[0] == 0
    kept = json.loads((folder / "all_results.json").read_text())
    cut(folder / "seed_1" / "all_results.json")
    code, said = run(folder, seeds="1,2", **own)
    again = json.loads((folder / "all_results.json").read_text())
    assert code == 0 and "seed_2 is finished" in said and again["eval_loss"] == kept["eval_loss"]
    code, said = run(folder, seeds="1,2", **own, learning_rate=0.2)
    assert code == 2 and "seed_1 holds a run that was begun with learning_rate 0.01 instead of 0.2" in said
    assert run(folder, **own)[0] == 2 and run(folder / "seed_1", **own, seeds="1,2")[0] == 2


def test_two_runs_do_not_share_a_folder(run, finished):
    with FolderLock(finished):
        code, said = run(finished)
    assert code == 2 and said.count("error: ") == 1 and f"error: --output_dir {finished} is in use by process " in said
    assert run(finished)[0] == 0
    assert not [path.name for path in finished.glob(".lock*")]


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path, monkeypatch):
    step = MethodTrainer.training_step

    def spoil(trainer, *arguments, **keywords):
        loss = step(trainer, *arguments, **keywords)
        if trainer.state.global_step == 2:
            trainer.model.classifier.weight.data[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(MethodTrainer, "training_step", spoil)
    code, said = run(tmp_path, save_steps=1, max_steps=5, save_total_limit=1)
    assert code == 1 and said.count("error: ") == 1
    assert "no checkpoint after update 3: classifier.weight is not finite" in said
    assert f"the newest good checkpoint is {tmp_path / 'checkpoint-2'}" in said.splitlines()[-1]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "all_results.json").exists() and not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    assert run(tmp_path, save_steps=1, max_steps=5, save_total_limit=1)[0] == 0


def test_a_run_ends_after_ten_updates_that_are_not_finite(run, tmp_path, monkeypatch):
    compute_loss = MethodTrainer.compute_loss

    def infinite(trainer, *arguments, **keywords):
        loss = compute_loss(trainer, *arguments, **keywords)
        return loss * float("inf") if trainer.state.global_step >= 3 else loss

    monkeypatch.setattr(MethodTrainer, "compute_loss", infinite)
    code, said = run(tmp_path, max_steps=20, save_steps=2)
    assert code == 1 and said.count("skipped update") == 10
    assert said.splitlines()[-1].startswith("error: the gradients of 10 updates in a row, up to 12, are not finite: ")


def test_an_older_checkpoint_goes_only_when_the_newer_one_is_complete(run, tmp_path, monkeypatch):
    class Gone(BaseException):
        pass

    def killed(folder, *_):
        if folder.name == "checkpoint-4":
            raise Gone

    monkeypatch.setattr("peft_pretraining.finetune.checkpointing.write_settings", killed)
    with pytest.raises(Gone):
        run(tmp_path, save_total_limit=1)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.slow
def test_the_best_checkpoint_is_looked_for_where_the_run_is(run, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    assert run(tmp_path / "run", **best)[0] == 0
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    (moved / "all_results.json").unlink()
    state = checkpoints.trainer_state(moved / "checkpoint-4")
    shutil.rmtree(moved / "checkpoint-5")
    assert run(moved, **best)[0] == 0
    kept = json.loads((moved / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(kept).parent == moved
    cut(moved / f"checkpoint-{state['best_global_step']}" / "model.safetensors")
    (moved / "all_results.json").unlink()
    code, said = run(moved, **best)
    assert code in (0, 2) and f"the best model, checkpoint-{state['best_global_step']}: " in said


def test_full_disk_is_one_line(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "optimizer.pt")

    monkeypatch.setattr("transformers.trainer.torch.save", full)
    code, said = run(tmp_path)
    assert code == 1 and said.count("error: ") == 1 and "No space left on device" in said and "Traceback" not in said


def test_what_lacks_weights_is_no_checkpoint(unfinished):
    def load_result(missing, unexpected):
        return type("Result", (), {"missing_keys": missing, "unexpected_keys": unexpected})

    trainer = object.__new__(MethodTrainer)
    trainer.model = torch.nn.Module()
    trainer.model.a, trainer.model.c = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    trainer.model.b = torch.nn.Linear(2, 2, bias=False)
    trainer.model.b.weight = trainer.model.a.weight
    trainer._issue_warnings_after_load(load_result(["b.weight"], []))  # tied, and saved once
    with pytest.raises(CheckpointUnusable, match=r"it lacks c\.weight"):
        trainer._issue_warnings_after_load(load_result(["c.weight"], []))
    with pytest.raises(CheckpointUnusable, match=r"it has, beside the model's weights, module\.a\.weight"):
        trainer._issue_warnings_after_load(load_result([], ["module.a.weight"]))
