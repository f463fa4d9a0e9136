"""The table of option tasks: the words around each row, its labels, and rows that cannot be used."""

import numpy as np
import pytest
from option_helpers import ROWS, winogrande_twins, write_rows

from peft_pretraining.finetune.options.examples import load_splits
from peft_pretraining.finetune.options.metrics import compute
from peft_pretraining.finetune.options.settings import OptionSettings
from peft_pretraining.finetune.options.tasks import TASKS, find_task
from peft_pretraining.flags import ConfigError

PROMPTS = {
    "WinoGrande": (
        "The rats fled the holes for the fields since the holes",
        [" were crowded.", " were crowded."],
    ),
    "SST2": ("a warm film It was", [" terrible", " great"]),
    "RTE": ('Ann met Bo.\nDoes this mean that "Bo met Ann." is true? Yes or No?\n', ["Yes", "No"]),
    "CB": ('Suppose He said it rained. Can we infer that "it rained"? Yes, No, or Maybe?\n', ["Yes", "No", "Maybe"]),
    "BoolQ": ("Ice melts at 0 C. Does ice melt?", [" No", " Yes"]),
    "WSC": (
        'Mark told Pete lies. He was sly.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
        ["No", "Yes"],
    ),
    "WIC": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The bank lends.\nThe bank is muddy.\n",
        ["No", "Yes"],
    ),
    "MultiRC": (
        'Bo ate figs.\nQuestion: What did Bo eat?\nI found this answer "figs". Is that correct? Yes or No?\n',
        ["No", "Yes"],
    ),
    "Copa": ("The man slipped because", [" the floor was wet.", " I sang."]),
}
LABELS = {"WinoGrande": [0, 1], "SST2": [1, 0], "RTE": [0, 1], "CB": [2, 0, 1], "BoolQ": [1, 0], "WSC": [1]}
LABELS |= {"WIC": [0], "MultiRC": [1, 0], "Copa": [0, 1]}


@pytest.mark.parametrize("name", TASKS)
def test_prompt_options_and_labels(name):
    examples = [TASKS[name].example(row, number) for number, row in enumerate(ROWS[name])]
    prompt, options = PROMPTS[name]
    assert examples[0].choices[0].prompt == prompt
    assert [choice.text for choice in examples[0].choices] == options
    assert [example.label for example in examples] == LABELS[name]


def test_winogrande_fills_the_blank_and_scores_the_rest():
    task = TASKS["WinoGrande"]
    first, second = task.example(ROWS["WinoGrande"][0], 0).choices
    assert second.prompt == "The rats fled the holes for the fields since the fields"
    assert (first.content_free, second.content_free) == ("holes", "fields")
    assert task.example(ROWS["WinoGrande"][1], 0).demonstration == (
        "The rats fled the holes for the fields since the fields were roomy."
    )
    at_the_end = {"sentence": "The jar was larger than the _ ", "option1": "cup", "option2": "can", "answer": "1"}
    choices = task.example(at_the_end, 0).choices
    assert [(choice.prompt, choice.text) for choice in choices] == [
        ("The jar was larger than the ", "cup"),
        ("The jar was larger than the ", "can"),
    ]


def test_copa_joins_cause_and_effect():
    cause, effect = (TASKS["Copa"].example(row, 0) for row in ROWS["Copa"])
    assert cause.choices[1].content_free == "because"
    assert effect.demonstration == "The glass fell so it broke."


def test_braces_in_a_row_are_text():
    example = TASKS["SST2"].example({"sentence": "{label} {0}", "label": 0}, 0)
    assert example.choices[0].prompt == "{label} {0} It was"


def test_task_names_in_any_capitals():
    assert find_task("winogrande").name == "WinoGrande"
    with pytest.raises(ValueError, match="must be one of WinoGrande, SST2"):
        find_task("SQuAD")


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("SST2", {"label": 0}, "no column 'sentence' (there is label)"),
        ("SST2", {"sentence": "good", "label": 2}, "label 2 is not in the label set 0, 1, negative, positive"),
        ("SST2", {"sentence": None, "label": 1}, "sentence is not text but None"),
        ("WinoGrande", ROWS["WinoGrande"][0] | {"answer": 0}, "answer 0 is not in the label set 1, 2"),
        ("WinoGrande", ROWS["WinoGrande"][0] | {"option2": " "}, "option2 is empty: a choice needs 2 options"),
        ("WinoGrande", ROWS["WinoGrande"][0] | {"sentence": "a _ b _"}, "sentence must have one _"),
        ("Copa", ROWS["Copa"][0] | {"choice2": None}, "choice2 is empty: a choice needs 2 options"),
        ("Copa", ROWS["Copa"][0] | {"question": "why"}, "question must be cause or effect"),
    ],
)
def test_rows_that_cannot_be_used(task, row, message, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*ROWS[task], row, row])
    with pytest.raises(ConfigError) as caught:
        load_splits(TASKS[task], OptionSettings(train_file=str(file)))
    (problem,) = caught.value.problems
    assert problem.startswith(f"{file}: row {len(ROWS[task]) + 1} and 1 more: {message}")


def test_all_files_are_checked_at_once(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"sentence": \n')
    settings = OptionSettings(
        train_file=str(tmp_path / "empty.jsonl"),
        validation_file=str(tmp_path / "broken.jsonl"),
        test_file=str(tmp_path / "none.jsonl"),
    )
    with pytest.raises(ConfigError) as caught:
        load_splits(TASKS["SST2"], settings)
    empty, broken, none = caught.value.problems
    assert empty.endswith("empty.jsonl: holds no rows")
    assert "broken.jsonl: cannot be read (line 1 is not valid JSON" in broken
    assert none.endswith("none.jsonl: cannot be read (No such file or directory)")


def ids(examples):
    return [example.row for example in examples]


def test_train_dev_and_test_of_one_file_keep_twins_together(tmp_path):
    file = write_rows(tmp_path / "twins.jsonl", winogrande_twins(50))
    settings = {"data_file": str(file), "train_all": True, "split_by": "twins", "num_eval": 20}
    splits = load_splits(TASKS["WinoGrande"], OptionSettings(**settings))
    parts = [ids(splits.train), ids(splits.dev), ids(splits.test)]
    assert [len(part) for part in parts] == [72, 8, 20]
    assert sorted(row for part in parts for row in part) == list(range(100))
    for part in parts:
        assert {row ^ 1 for row in part} == set(part)  # the partner of every row
    other = load_splits(TASKS["WinoGrande"], OptionSettings(**settings, train_set_seed=1))
    assert ids(other.test) == ids(splits.test) and ids(other.train) != ids(splits.train)


def test_numbers_of_examples(tmp_path):
    file = write_rows(tmp_path / "train.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in range(100)])
    settings = {"train_file": str(file), "test_file": str(file)}
    splits = load_splits(TASKS["SST2"], OptionSettings(**settings, num_train=30, num_dev=20, num_eval=10))
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [30, 20, 10]
    assert not set(ids(splits.train)) & set(ids(splits.dev))
    splits = load_splits(TASKS["SST2"], OptionSettings(**settings))
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [90, 10, 100]
    splits = load_splits(TASKS["SST2"], OptionSettings(**settings, validation_file=str(file), train_all=True))
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [100, 100, 100]
    splits = load_splits(TASKS["SST2"], OptionSettings(**settings, trainer="none", num_train=3))
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [3, 0, 100]


def test_split_by_a_column(tmp_path):
    rows = [{**ROWS["MultiRC"][0], "paragraph": f"Text {n // 5}.", "question": str(n)} for n in range(50)]
    file = write_rows(tmp_path / "multirc.jsonl", rows)
    settings = OptionSettings(data_file=str(file), train_all=True, split_by="paragraph")
    splits = load_splits(TASKS["MultiRC"], settings)
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [40, 5, 5]
    for part in (splits.train, splits.dev, splits.test):
        assert all(sum(row // 5 == other // 5 for other in ids(part)) == 5 for row in ids(part))


def test_twins_must_be_twins(tmp_path):
    rows = winogrande_twins(3)
    for broken, message in ((rows[:5], "row 5 has no partner"), (rows[1:5], "rows 1 and 2 have different options")):
        file = write_rows(tmp_path / "twins.jsonl", broken)
        with pytest.raises(ConfigError, match=f"--split_by twins: {message}"):
            load_splits(TASKS["WinoGrande"], OptionSettings(data_file=str(file), split_by="twins"))


def test_shuffled_options_keep_the_right_one(tmp_path):
    file = write_rows(tmp_path / "twins.jsonl", winogrande_twins(100))
    settings = {"train_file": str(file), "num_dev": 2}
    plain = load_splits(TASKS["WinoGrande"], OptionSettings(**settings)).train
    shuffled = load_splits(TASKS["WinoGrande"], OptionSettings(**settings, shuffle_options=True)).train
    assert [one.choices[one.label] for one in plain] == [one.choices[one.label] for one in shuffled]
    moved = sum(one.label != other.label for one, other in zip(plain, shuffled, strict=True))
    assert 70 < moved < 130  # about half of 198
    firsts = sum(one.label == 0 and one.row % 2 == 0 for one in shuffled)
    assert 30 < firsts < 70  # the first of the twins is no longer always answered by its first option


def test_metrics_by_hand():
    right, predicted = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1])
    # Label 1: precision 2/3, recall 2/3.
    assert compute(("accuracy", "f1"), predicted, right, 2) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    right, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    # F1 of the three labels: 2/3, 2/3, 1.
    assert compute(("accuracy", "f1"), predicted, right, 3) == pytest.approx({"accuracy": 0.75, "f1": 7 / 9})
