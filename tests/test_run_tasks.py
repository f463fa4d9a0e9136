"""`run_tasks.py` from its command line to the files it leaves."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from option_helpers import ROWS, save_tiny_model, sentiment_rows, winogrande_twins, write_rows
from safetensors.torch import load_file

import run_tasks
from peft_pretraining.finetune.options import trainer as option_trainer

PROJECT = Path(run_tasks.__file__).parent

# The two command lines of the older script, but for paths and the number of epochs.
OLDER = (
    "--task_name=WinoGrande --num_train_epochs=2 --per_device_train_batch_size=16 --load_best_model_at_end "
    "--evaluation_strategy=epoch --save_strategy=epoch --save_total_limit=1 --eval_steps=500 --max_steps=-1 "
    "--logging_steps=10 --num_eval=1000 --num_train=1000 --num_dev=100 --train_all=True "
    "--train_as_classification=False --trainer=regular --train_set_seed=0 --lr_scheduler_type=constant "
    "--save_steps=1000 --load_bfloat16 --bf16 --learning_rate=1e-3 --momentum=0.9 --dampening=0.0 --weight_decay=0.0"
).split()
SGD = ["--optimizer=sgd"]
GOLORE_SGD = (
    "--optimizer=golore_sgd --rank=1024 --update_proj_gap=500 --galore_scale=4.0 --proj_type=std --rand_ratio=0.8"
).split()


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """`Trainer` collects garbage when it begins, which takes a second for all that has been imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sentiment(tmp_path, model):
    """A function that runs SST2 on local rows; its exit code."""
    train = write_rows(tmp_path / "train.jsonl", sentiment_rows(48))
    test = write_rows(tmp_path / "test.jsonl", sentiment_rows(24))

    def run(folder="run", **changes):
        settings = {
            **{"task_name": "SST2", "model_name": model, "train_file": train, "test_file": test, "num_dev": 8},
            **{"output_dir": tmp_path / folder, "max_steps": 10, "per_device_train_batch_size": 8, "lr": 3e-3},
            **{"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True},
            **changes,
        }
        argv = [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]
        return run_tasks.main(argv)

    return run


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def history(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("optimizer", [SGD, GOLORE_SGD], ids=["sgd", "golore_sgd"])
def test_older_command_lines_run_as_they_stand(optimizer, model, tmp_path, capfd):
    train = write_rows(tmp_path / "train.jsonl", winogrande_twins(30))
    test = write_rows(tmp_path / "test.jsonl", winogrande_twins(10))
    files = [f"--model_name={model}", f"--output_dir={tmp_path / 'out'}", f"--train_file={train}"]
    assert run_tasks.main([*OLDER, *optimizer, *files, f"--test_file={test}", "--disable_tqdm", "True"]) == 0
    found = results(tmp_path / "out")
    assert [found[f"{split}_rows"] for split in ("train", "dev", "test")] == [54, 6, 20]
    assert found["train_loss"] < 6 and 0 <= found["test_accuracy"] <= 1
    out, err = capfd.readouterr()
    assert f"test_accuracy {found['test_accuracy']:.4f}" in out
    for warning in ("--bf16: there is no accelerator", "--load_bfloat16: there is no accelerator"):
        assert f"WARNING {warning}; float32 is used" in err
    assert "WARNING without effect beside the other flags: --num_train, --num_dev" in err
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    if optimizer is GOLORE_SGD:
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        projected = [group for group in state["param_groups"] if group.get("rank")]
        assert sum(len(group["params"]) for group in projected) == 14  # every linear layer of the two blocks
        assert {group["rand_ratio"] for group in projected} == {0.8} and {group["lr"] for group in projected} == {1e-3}


LOW_RANK = [("galore_adamw", 1e-2), ("galore_sgd", 0.3), ("golore_adamw", 1e-2), ("golore_sgd", 0.3)]


@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.3), ("adam", 3e-3), ("adamw", 3e-3), *LOW_RANK])
def test_every_optimizer_learns(optimizer, lr, sentiment, tmp_path):
    low_rank = {"rank": 8, "update_proj_gap": 10} if "lore" in optimizer else {}
    assert sentiment(optimizer=optimizer, lr=lr, max_steps=40, **low_rank) == 0
    found = results(tmp_path / "run")
    assert found["losses"][0] > 5 and found["losses"][-1] < 0.8, found["losses"]
    assert found["test_accuracy"] >= 0.9, found


def test_a_run_that_is_stopped_goes_on_exactly(sentiment, tmp_path):
    golore = {"optimizer": "golore_sgd", "rank": 4, "update_proj_gap": 3, "rand_ratio": 0.5, "lr": 0.1}
    golore |= {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    assert sentiment("whole", **golore) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "stopped" / "checkpoint-5")
    assert sentiment("stopped", **golore) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    start = load_file(tmp_path / "whole" / "checkpoint-5" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(one[name], start[name]) for name in one)
    whole, stopped = (results(tmp_path / name) for name in ("whole", "stopped"))
    assert whole["losses"] == stopped["losses"] and len(whole["losses"]) == 10
    assert whole["test_loss"] == stopped["test_loss"]


def test_the_best_model_on_dev_is_kept(sentiment, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.7, 0.9, 0.1, 0.2])  # three on dev, then dev and test of what was kept

    def scripted(*_):
        return {"accuracy": next(accuracies)}

    monkeypatch.setattr(option_trainer, "compute", scripted)
    steps = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 12}
    assert sentiment(load_best_model_at_end=True, **steps) == 0
    found = results(tmp_path / "run")
    assert (found["best_metric"], found["best_step"], found["eval_accuracy"]) == (0.9, 8, 0.9)
    kept = load_file(tmp_path / "run" / "model.safetensors")
    for step, same in ((8, True), (12, False)):
        weights = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(kept[name], weights[name]) for name in kept) == same
    losses = {
        entry["step"]: entry["eval_loss"]
        for entry in history(tmp_path / "run" / "checkpoint-12")
        if "eval_loss" in entry
    }
    assert found["eval_loss"] == losses[8]


@pytest.mark.parametrize("classification", [False, True])
def test_micro_batches_add_up_to_the_batch(classification, sentiment, tmp_path):
    settings = {"train_as_classification": classification, "max_steps": 3, "optimizer": "sgd", "lr": 0.1}
    assert sentiment("whole", **settings) == 0
    assert sentiment("parts", **settings, per_device_train_batch_size=2, gradient_accumulation_steps=4) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-6
    whole, parts = (results(tmp_path / name)["losses"] for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, abs=1e-5)


def test_training_as_classification_learns(sentiment, tmp_path):
    assert sentiment(train_as_classification=True, max_steps=40) == 0
    found = results(tmp_path / "run")
    assert found["losses"][0] == pytest.approx(0.69, abs=0.1) and found["losses"][-1] < 0.2
    assert found["test_accuracy"] == 1.0


def test_the_whole_sequence_can_be_learnt(sentiment, tmp_path):
    assert sentiment("option", max_steps=1) == 0
    assert sentiment("whole", max_steps=1, only_train_option=False) == 0
    option, whole = (results(tmp_path / name)["losses"] for name in ("option", "whole"))
    assert abs(option[0] - whole[0]) > 1e-4


def test_in_context_without_training(sentiment, model, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for shown in (None, 0, 4):
        assert sentiment(f"shown{shown}", trainer="none", num_train=shown, num_dev=None, save_predictions=True) == 0
    scores = {
        shown: [
            json.loads(line) for line in (tmp_path / f"shown{shown}" / "predictions.jsonl").read_text().splitlines()
        ]
        for shown in (None, 0, 4)
    }
    assert scores[None] == scores[0] != scores[4]
    assert [line["row"] for line in scores[0]] == list(range(24))
    assert [line["label"] for line in scores[0]] == [n % 2 for n in range(24)]
    right = sum(line["prediction"] == line["label"] for line in scores[0])
    assert results(tmp_path / "shown0")["test_accuracy"] == pytest.approx(right / 24)
    assert results(tmp_path / "shown4")["train_rows"] == 4
    assert not (tmp_path / "shown0" / "model.safetensors").exists()
    assert before == {path.name: path.read_bytes() for path in model.iterdir()}


def test_sfc_changes_scores_and_keeps_the_loss(sentiment, tmp_path):
    for folder, sfc in (("plain", False), ("sfc", True)):
        assert sentiment(folder, trainer="none", num_dev=None, sfc=sfc, save_predictions=True) == 0
    plain, sfc = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("plain", "sfc"))
    assert plain != sfc
    assert results(tmp_path / "plain")["test_loss"] == pytest.approx(results(tmp_path / "sfc")["test_loss"], abs=1e-6)


@pytest.mark.parametrize("task", ROWS)
def test_every_task_runs(task, model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS[task] * 4)
    files = ["--train_file", str(file), "--test_file", str(file), "--num_dev", "2", "--save_model", "False"]
    argv = ["--task_name", task, "--model_name", str(model), "--output_dir", str(tmp_path / "run"), *files]
    argv += [
        "--max_steps",
        "1",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "True",
        "--result_file",
        str(tmp_path / "r"),
    ]
    assert run_tasks.main(argv) == 0
    found = results(tmp_path / "run")
    assert found == json.loads((tmp_path / "r").read_text())
    assert 0 <= found["test_accuracy"] <= 1 and found["test_rows"] == 4 * len(ROWS[task])
    assert ("test_f1" in found) == (task in ("CB", "MultiRC"))


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(model, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", sentiment_rows(48))
    test = write_rows(tmp_path / "test.jsonl", sentiment_rows(25))  # the last batch is not full
    common = ["run_tasks.py", "--task_name", "SST2", "--model_name", model, "--train_file", train, "--test_file", test]
    common += ["--max_steps", 4, "--optimizer", "golore_sgd", "--rank", 4, "--lr", 0.1, "--save_strategy", "no"]
    common += ["--num_dev", 7, "--per_device_eval_batch_size", 4, "--disable_tqdm", True, "--save_predictions"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    for folder, start, batch in (("one", [sys.executable], 8), ("two", launcher, 4)):
        command = [*start, *common, "--per_device_train_batch_size", batch, "--output_dir", tmp_path / folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([str(part) for part in command], check=True, cwd=PROJECT, env=environment)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    first, second = (results(tmp_path / name) for name in ("one", "two"))
    for name in ("eval_accuracy", "test_accuracy", "test_loss"):
        assert first[name] == pytest.approx(second[name], abs=1e-4), name
    rows = [
        [json.loads(line)["row"] for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert rows[0] == rows[1] == list(range(25))


def test_demonstrations_are_counted_as_such(sentiment, capfd):
    assert sentiment(trainer="none", num_train=8, num_dev=None) == 0
    assert "INFO 8 demonstrations, 0 for dev, 24 for the test" in capfd.readouterr().err
