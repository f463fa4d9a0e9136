"""GLUE's tasks: metrics against numbers worked out by hand, labels, files, and a run of each."""

import json
import math

import numpy as np
import pytest
import torch
from finetune_helpers import ROWS, glue_flags, rows, run_glue, write_bert, write_rows

from peft_pretraining.finetune import glue_data
from peft_pretraining.finetune.glue_settings import GlueSettings
from peft_pretraining.finetune.glue_tasks import GLUE_TASKS, compute_metrics
from peft_pretraining.flags import ConfigError


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def files(tmp_path):
    """A function: flags with tiny files of a task."""

    def build(task: str, **changes):
        flags = {
            "train_file": write_rows(tmp_path / "train.jsonl", rows(task, 24, seed=1)),
            "validation_file": write_rows(tmp_path / "validation.jsonl", rows(task, 12, seed=2)),
            **{"task_name": task, "output_dir": tmp_path / "out"},
        }
        return {**flags, **changes}

    return build


def logits_for(*classes: int) -> np.ndarray:
    return np.eye(3)[list(classes)][:, : max(classes) + 1 if max(classes) > 1 else 2]


def test_matthews_by_hand():
    # tp 3, tn 1, fp 2, fn 1: (3·1 - 2·1) / sqrt(5 · 4 · 3 · 2)
    found = compute_metrics(GLUE_TASKS["cola"], logits_for(1, 1, 1, 0, 1, 1, 0), np.array([1, 1, 1, 0, 0, 0, 1]))
    assert found == {"matthews_correlation": pytest.approx(1 / math.sqrt(120))}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_accuracy_and_f1_by_hand(task):
    # tp 2, fp 1, fn 1: precision and recall 2/3
    found = compute_metrics(GLUE_TASKS[task], logits_for(1, 1, 1, 0, 0), np.array([1, 1, 0, 1, 0]))
    assert found["accuracy"] == pytest.approx(3 / 5) and found["f1"] == pytest.approx(2 / 3)
    assert found["combined_score"] == pytest.approx((3 / 5 + 2 / 3) / 2)


def test_pearson_and_spearman_by_hand():
    scores, labels = np.array([[1.0], [2.0], [3.0], [10.0]]), np.array([1.0, 3.0, 2.0, 4.0])
    found = compute_metrics(GLUE_TASKS["stsb"], scores, labels)
    assert found["spearmanr"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # ranks differ by 1 twice
    assert found["pearson"] == pytest.approx(13 / math.sqrt(50 * 5))  # centred: (-3,-2,-1,6) and (-1.5,.5,-.5,1.5)
    assert compute_metrics(GLUE_TASKS["stsb"], np.ones((4, 1)), labels)["pearson"] == 0.0


@pytest.mark.parametrize("task", ["mnli", "qnli", "rte", "sst2", "wnli"])
def test_accuracy_by_hand(task):
    found = compute_metrics(GLUE_TASKS[task], logits_for(1, 0, 1, 0), np.array([1, 1, 1, 0]))
    assert found == {"accuracy": 0.75}


def test_labels_have_their_official_numbers():
    labels = {name: task.labels for name, task in GLUE_TASKS.items()}
    assert labels["mnli"] == ("entailment", "neutral", "contradiction")
    assert labels["qnli"] == labels["rte"] == ("entailment", "not_entailment")
    assert labels["wnli"] == ("not_entailment", "entailment")
    assert labels["cola"] == ("unacceptable", "acceptable") and labels["sst2"] == ("negative", "positive")
    assert labels["mrpc"] == ("not_equivalent", "equivalent") and labels["qqp"] == ("not_duplicate", "duplicate")
    assert GLUE_TASKS["stsb"].is_regression


@pytest.mark.parametrize("task", sorted(GLUE_TASKS))
def test_every_task_trains_and_evaluates(task, bert, files, tmp_path):
    second = {"validation_mismatched_file": write_rows(tmp_path / "mm.jsonl", rows(task, 10, seed=3))}
    flags = files(task, model_name_or_path=bert, max_steps=2, **(second if task == "mnli" else {}))
    results = run_glue(**flags)
    names = {"cola": ["matthews_correlation"], "stsb": ["pearson", "spearmanr"]}
    names |= {name: ["accuracy", "f1"] for name in ("mrpc", "qqp")}
    for name in names.get(task, ["accuracy"]):
        assert -1 <= results[f"eval_{name}"] <= 1
    assert results["eval_samples"] == 12 and results["task"] == task
    assert results.get("eval_samples_mm") == (10 if task == "mnli" else None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tuple(config.get("id2label", {"0": "LABEL_0"}).values()) == (GLUE_TASKS[task].labels or ("LABEL_0",))


def test_both_mnli_sets_are_evaluated_on_their_own_rows(bert, files, tmp_path):
    """The matched rows have the labels that the model gives, the mismatched ones others."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run_glue(**files("mnli", model_name_or_path=bert, do_eval=False, max_steps=1))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    matched = rows("mnli", 20, seed=5)
    for row in matched:
        with torch.no_grad():
            row["label"] = int(
                model(**tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")).logits.argmax()
            )
    mismatched = [{**row, "label": (row["label"] + 1) % 3} for row in matched[:15]]
    results = run_glue(
        model_name_or_path=tmp_path / "out", task_name="mnli", do_train=False, output_dir=tmp_path / "evaluated",
        validation_file=write_rows(tmp_path / "m.jsonl", matched),
        validation_mismatched_file=write_rows(tmp_path / "mm.jsonl", mismatched),
    )  # fmt: skip
    assert (results["eval_accuracy"], results["eval_samples"]) == (1.0, 20)
    assert (results["eval_accuracy_mm"], results["eval_samples_mm"]) == (0.0, 15)


def test_regression_learns_scores(bert, files):
    results = run_glue(**files("stsb", model_name_or_path=bert, max_steps=100, learning_rate=3e-3, warmup_steps=5))
    assert results["eval_pearson"] > 0.8 and results["eval_loss"] < 1.0


def load(**settings):
    return glue_data.load_rows(GlueSettings(**{name: str(value) for name, value in settings.items()}))


def test_label_names_and_numbers_are_the_same(tmp_path):
    content = rows("rte", 4)
    named = [{**row, "label": GLUE_TASKS["rte"].labels[row["label"]]} for row in content]
    _, numbers = load(task_name="rte", train_file=write_rows(tmp_path / "a.jsonl", content))
    _, names = load(task_name="rte", train_file=write_rows(tmp_path / "b.jsonl", named))
    assert numbers["train"]["label"] == names["train"]["label"] == [row["label"] for row in content]


def test_own_classification_and_regression_from_csv(tmp_path):
    (tmp_path / "train.csv").write_text("idx,text,other,label\n0,NA,b,yes\n1,null,c,no\n2,a,,maybe\n")
    task, splits = load(train_file=tmp_path / "train.csv")
    assert task.labels == ("maybe", "no", "yes") and task.columns == ("text", "other")
    assert splits["train"]["text"][:] == ["NA", "null", "a"] and splits["train"]["label"][:] == [2, 1, 0]
    (tmp_path / "scores.tsv").write_text("text\tlabel\na\t0.5\nb\t2\n")
    task, splits = load(train_file=tmp_path / "scores.tsv")
    assert task.is_regression and task.columns == ("text",) and splits["train"]["label"][:] == [0.5, 2.0]


def test_labels_that_are_numbers_from_one(tmp_path):
    write_rows(tmp_path / "a.json", [{"text": "a", "label": 2}, {"text": "b", "label": 1}])
    task, splits = load(train_file=tmp_path / "a.json")
    assert task.labels == ("1", "2") and splits["train"]["label"][:] == [1, 0]


@pytest.mark.parametrize(
    "content, settings, parts",
    [
        ([{"premise": "a", "label": 0}], {"task_name": "mnli"}, ("no column 'hypothesis'", "premise, label")),
        ([{"sentence": "a", "label": 2}], {"task_name": "sst2"}, ("label 2 is not one of negative, positive",)),
        ([{"sentence": "a", "label": "bad"}], {"task_name": "sst2"}, ("label 'bad' is not",)),
        ([{"sentence": "a", "label": -1}], {"task_name": "cola"}, ("label -1 is not",)),
        ([{"sentence1": "a", "sentence2": "b", "label": "x"}], {"task_name": "stsb"}, ("'x' is not a number",)),
        ([{"sentence": None, "label": 1}, {"sentence": "a", "label": 0}], {"task_name": "sst2"}, ("nothing in",)),
        ([{"text": "a"}], {}, ("no column 'label'", "text")),
        ([{"number": 3, "label": 1}], {}, ("no column of text", "--text_columns")),
    ],
)
def test_bad_rows(tmp_path, content, settings, parts):
    with pytest.raises(ConfigError) as error:
        load(train_file=write_rows(tmp_path / "train.jsonl", content), **settings)
    assert len(error.value.problems) == 1
    for part in parts:
        assert part in error.value.problems[0]


@pytest.mark.parametrize("text, name", [("sentence,label\n", "a.csv"), ("[]", "a.json"), ('{"a": ', "a.jsonl")])
def test_files_without_rows_end_with_exit_code_2(tmp_path, text, name, bert, capsys):
    import run_glue as script

    (tmp_path / name).write_text(text)
    flags = {"model_name_or_path": bert, "task_name": "sst2", "output_dir": tmp_path / "out", "use_cpu": True}
    flags |= {"train_file": tmp_path / name, "validation_file": tmp_path / name}
    assert script.main(glue_flags(**flags)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines and all(name in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_hub_that_cannot_be_reached_is_one_line(tmp_path, bert, capsys, monkeypatch):
    import run_glue as script

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(glue_data, "load_dataset", unreachable)
    flags = {"model_name_or_path": bert, "task_name": "sst2", "output_dir": tmp_path / "out", "use_cpu": True}
    assert script.main(glue_flags(**flags)) == 2
    assert "error: --task_name sst2: nyu-mll/glue cannot be loaded" in capsys.readouterr().err


def test_predictions_of_a_test_file_without_labels(bert, files, tmp_path):
    first, _, _ = ROWS["sst2"]
    test = write_rows(tmp_path / "test.jsonl", [{first: "w0 w9"}, {first: "w1"}, {first: "w1 w8 w7"}])
    run_glue(**files("sst2", model_name_or_path=bert, do_predict=True, test_file=test, max_steps=1))
    lines = (tmp_path / "out" / "predict_results_sst2.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 4
    assert {line.split("\t")[1] for line in lines[1:]} <= {"negative", "positive"}


def test_sample_limits_and_fixed_padding(bert, files):
    flags = files("mrpc", model_name_or_path=bert, max_train_samples=8, max_eval_samples=5, max_steps=-1)
    results = run_glue(**flags, num_train_epochs=1, pad_to_max_length=True)
    assert results["eval_samples"] == 5 and results["train_steps"] == 2


def test_seeds_give_mean_and_deviation(bert, files, tmp_path, capsys):
    flags = files("sst2", model_name_or_path=bert, seeds="1,2,3", max_steps=3)
    results = run_glue(**flags)
    single = [json.loads((tmp_path / "out" / f"seed_{seed}" / "all_results.json").read_text()) for seed in (1, 2, 3)]
    losses = [run["eval_loss"] for run in single]
    assert len(set(losses)) == 3 and [run["seed"] for run in single] == [1, 2, 3]
    assert results["eval_loss"] == pytest.approx(np.mean(losses))
    assert results["eval_loss_std"] == pytest.approx(np.std(losses, ddof=1))
    assert results["seeds"] == [1, 2, 3] and results["runs"]["2"] == single[1]
    assert "eval_accuracy" in capsys.readouterr().out
    (tmp_path / "out" / "seed_2" / "all_results.json").unlink()
    again = run_glue(**flags)  # only the missing one is run again, and gives the same
    assert again["runs"]["2"]["eval_loss"] == single[1]["eval_loss"]
    assert again["runs"]["1"] == single[0]
