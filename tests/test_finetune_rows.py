"""Rows of files for GLUE and option tasks: text stays text, and what cannot be used is refused by its row's number."""

import json

import pytest

from peft_pretraining.finetune.glue_data import load_rows
from peft_pretraining.finetune.glue_settings import GlueSettings
from peft_pretraining.finetune.options.examples import load_splits
from peft_pretraining.finetune.options.settings import OptionSettings
from peft_pretraining.finetune.options.tasks import TASKS
from peft_pretraining.finetune.rows import read_rows
from peft_pretraining.flags import ConfigError

DEEP = b"[" * 100_000


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path, **settings):
    task, splits = load_rows(GlueSettings(train_file=str(path), **settings))
    return task, splits["train"].to_dict()


def refused(path, **settings):
    with pytest.raises(ConfigError) as error:
        load_rows(GlueSettings(train_file=str(path), **settings))
    return [line.removeprefix(f"{path}: ") for line in error.value.problems]


KEPT = {
    "marks.tsv": ('a\tsentence\tlabel\n0\t"One "\t1\n1\t"two\t0\n2\tan " alone\t1\n', ['"One "', '"two', 'an " alone']),
    "marks.csv": ('sentence,label\n"One, ""two""\r\nthree",1\r\n x,0\r\n', ['One, "two"\r\nthree', " x"]),
    "numbers.csv": ("sentence,label\n007,1\n1e5,0\nTrue,1\nNA,0\nnull,1\n", ["007", "1e5", "True", "NA", "null"]),
    "all_numbers.csv": ("sentence,label\n007,1\n1.50,0\n", ["007", "1.50"]),
    "nameless.csv": ("thing,label\n007,1\n1.50,0\n", ["007", "1.50"]),
    "index.csv": ("index,thing,label\n1,a,1\n2,b,0\n", ["a", "b"]),
    "mark.csv": ("\ufeffsentence,label\na,1\nb,0\n", ["a", "b"]),
    "mark.jsonl": ('\ufeff{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 0}\n', ["a", "b"]),
    "mark.json": ('\ufeff[{"sentence": "a", "label": 1},\n{"sentence": "b", "label": 0}]', ["a", "b"]),
    "nul.csv": ("sentence,label\na\0b,1\nb,0\n", ["a\0b", "b"]),
    "nul.tsv": ("sentence\tlabel\na\0b\t1\nb\t0\n", ["a\0b", "b"]),
    "ends.jsonl": ('{"sentence": "a\\r\\n", "label": 1}\r\n\r\n{"sentence": "b", "label": 0}\r\n', ["a\r\n", "b"]),
    "half.jsonl": ('{"sentence": "a\\ud800", "label": 1}\n{"sentence": "b", "label": 0}\n', ["a?", "b"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_text_is_kept(name, tmp_path):
    content, texts = KEPT[name]
    task, rows = load(write(tmp_path, name, content))
    assert rows.pop("label") == [(number + 1) % 2 for number in range(len(texts))]
    assert rows == {task.columns[0]: texts}
    assert task.labels == ("0", "1")


def test_columns_of_text_that_are_not_used_are_named(tmp_path, caplog):
    content = "question,answer,source,label\na,b,c,1\nd,e,f,0\n"
    with caplog.at_level("WARNING", "peft_pretraining"):
        task, _ = load(write(tmp_path, "three.csv", content))
    assert task.columns == ("question", "answer")
    assert "the texts are in 'question' and 'answer'; 'source' is not used (--text_columns)" in caplog.text


REFUSED = {
    "missing.csv": (
        "sentence,label\nfine,1\n,0\nnone,\nother,0\n",
        ["row 2: there is no text", "row 3: label is miss"],
    ),
    "more.csv": ('sentence,label\n"a, b",1\nc,d,0\ne,f,0\n', ["rows 2, 3: more fields than the 2 of the header"]),
    "fewer.tsv": ("sentence\tlabel\na\t1\nb\n", ["row 2: fewer fields than the 2"]),
    "odd.csv": ("sentence,label\na,0.5\nb,nan\nc,-inf\nd,3\n", ["row 2: label 'nan' is not a finite", "row 3: label"]),
    "odd_whole.csv": ("sentence,label\na,1\nb,NaN\nc,2\n", ["row 2: label 'NaN' is not a finite number"]),
    "gap.csv": ("sentence,label\na,0.5\nb,1.5\nc,n/a\n", ["row 3: label 'n/a' is not a number"]),
    "one.csv": ("sentence,label\na,yes\nb,yes\n", ["every row has the label 'yes'"]),
    "twice.csv": ("sentence,label,label\na,1,0\n", ["the header has 'label' more than once"]),
    "header.csv": ("sentence,label\n", ["holds no rows"]),
    "open.csv": ('sentence,label\na,1\n"b,0\nc,1\n', ["row 2 (line 4): not valid as it is quoted"]),
    "utf16.csv": ("sentence,label\na,1\n".encode("utf-16"), ["it is UTF-16, not UTF-8"]),
    "latin.csv": ("sentence,label\ncafé,1\n".encode("latin-1"), ["it is not UTF-8 (byte 0xe9)"]),
    "list.jsonl": ('{"sentence": ["a"], "label": 1}\n{"sentence": "b", "label": 0}\n', ["row 1: sentence is not text"]),
    "number.jsonl": (
        '{"sentence": 7, "label": 1}\n{"sentence": "b", "label": 0}\n',
        ["row 1: sentence is not text but 7"],
    ),
    "null.jsonl": ('{"sentence": null, "label": 1}\n{"label": 0}\n', ["rows 1, 2: there is nothing in 'sentence'"]),
    "labels.jsonl": (
        '{"sentence": "a", "label": [1]}\n{"sentence": "b", "label": null}\n{"sentence": "c", "label": 1}\n',
        ["row 1: label [1] is not", "row 2: label is missing"],
    ),
    "nan.jsonl": (
        '{"sentence": "a", "label": NaN}\n{"sentence": "b", "label": 1}\n',
        ["row 1: label nan is not a finite"],
    ),
    "deep.jsonl": (
        b'{"sentence": "a", "label": 1}\n{"a": ' + DEEP + b"}\n",
        ["cannot be read (line 2 is nested too deep"],
    ),
    "deep.json": (DEEP, ["cannot be read (it is nested too deeply)"]),
    "keys.jsonl": (
        '{"sentence": "a", "label": 1, "label": 0}\n',
        ["cannot be read (line 1 is not valid JSON (the key"],
    ),
    "digits.jsonl": ('{"sentence": "a", "label": ' + "9" * 5000 + "}\n", ["cannot be read (line 1 is not valid JSON"]),
    "values.jsonl": ('"x"\n3\nnull\n', ["rows 1, 2, 3: it is not a JSON object"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_number(name, tmp_path):
    content, expected = REFUSED[name]
    found = refused(write(tmp_path, name, content))
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start), found
        assert "\n" not in line and len(line) < 400


def test_empty_lines_are_counted(tmp_path, caplog):
    path = write(tmp_path, "a.csv", "\n\nsentence,label\n\na,1\n\nb,0\n\n")
    assert load(path)[1] == {"sentence": ["a", "b"], "label": [1, 0]}
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{path}: 5 empty lines are passed over"
    ]


@pytest.mark.parametrize("labels", [["0.5", "2", "1e1"], ["1.0", "2.0", "0.0"]])
def test_labels_with_fractions_mean_regression_and_it_is_said(labels, tmp_path, caplog):
    caplog.set_level("INFO", "peft_pretraining")
    task, rows = load(write(tmp_path, "a.csv", "sentence,label\n" + "".join(f"a,{label}\n" for label in labels)))
    assert task.is_regression and rows["label"] == list(map(float, labels))
    assert "regression, for labels have fractions" in caplog.text


def test_classes_are_sorted_as_what_they_are(tmp_path):
    path = write(tmp_path, "a.csv", "sentence,label\na,10\nb,9\nc,-1\n")
    assert load(path)[0].labels == ("-1", "9", "10")
    mixed = write(tmp_path, "b.jsonl", "".join(
        json.dumps({"sentence": "a", "label": label}) + "\n" for label in (1, "1", True, "no")
    ))  # fmt: skip
    task, rows = load(mixed)
    assert task.labels == ("1", "True", "no") and rows["label"] == [0, 0, 1, 2]


def test_labels_that_training_rows_do_not_have_are_refused(tmp_path):
    train = write(tmp_path, "train.csv", "sentence,label\na,x\nb,y\n")
    other = write(tmp_path, "validation.csv", "sentence,label\na,x\nb,z\n")
    with pytest.raises(ConfigError, match="row 2: label 'z' is not one of x, y"):
        load_rows(GlueSettings(train_file=str(train), validation_file=str(other)))
    fewer = write(tmp_path, "fewer.csv", "sentence,label\na,x\n")
    assert load_rows(GlueSettings(train_file=str(train), validation_file=str(fewer)))[0].labels == ("x", "y")


def test_one_class_of_a_task_cannot_be_learnt(tmp_path):
    path = write(tmp_path, "a.csv", "sentence,label\na,1\nb,positive\n")
    assert refused(path, task_name="sst2") == ["every row has the label 'positive': there is nothing to learn"]


def option_problems(path):
    with pytest.raises(ConfigError) as error:
        load_splits(TASKS["SST2"], OptionSettings(task_name="SST2", train_file=str(path)))
    return [line.removeprefix(f"{path}: ") for line in error.value.problems]


@pytest.mark.parametrize(
    "name", ["list.jsonl", "number.jsonl", "deep.jsonl", "keys.jsonl", "values.jsonl", "utf16.csv"]
)
def test_option_tasks_refuse_the_same(name, tmp_path):
    content, expected = REFUSED[name]
    (found,) = option_problems(write(tmp_path, name, content))
    assert found.startswith(expected[0])


@pytest.mark.parametrize("label", [None, 1.0, [1], {"a": 1}, 10**400, ""])
def test_option_tasks_refuse_labels_that_are_none(label, tmp_path):
    rows = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": label}]
    (found,) = option_problems(write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert found.startswith("row 2: label ") and "is not in the label set" in found and len(found) < 300


def test_option_tasks_keep_text(tmp_path):
    texts = ["it is <extra_id_0></s>", 'a "mark', "a\0b", "\ud800", "c\r\nd"]
    lines = "\ufeff" + "\r\n".join(json.dumps({"sentence": text, "label": 1}) for text in texts)
    rows = read_rows(write(tmp_path, "a.jsonl", lines))
    assert [row["sentence"] for row in rows] == [*texts[:3], "?", texts[4]]
