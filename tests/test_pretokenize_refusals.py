"""What `pretokenize.py` refuses: exit code 2, one line per problem, nothing left behind."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import pretokenize
from peft_pretraining.data.sources import find_source


@pytest.fixture(scope="module")
def byt5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "byt5"
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def refused(byt5, tmp_path, capsys):
    """A function that runs the command, which must refuse, and returns what it says, one problem per line."""

    def call(dataset, *extra, tokenizer=byt5, save_dir=tmp_path / "out", length=16) -> list[str]:
        argv = ["--dataset", dataset, "--save_dir", save_dir, "--sequence_length", length, "--num_cpu", 1, *extra]
        before = sorted(tmp_path.rglob("*"))
        code = pretokenize.main([str(part) for part in [*argv, *(["--tokenizer", tokenizer] if tokenizer else [])]])
        printed = capsys.readouterr()
        assert code == 2 and not printed.out and "Traceback" not in printed.err
        assert sorted(tmp_path.rglob("*")) == before
        return [line.removeprefix("error: ") for line in printed.err.split("\n") if line.startswith("error: ")]

    return call


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"This is document number {number}." for number in range(50)))
    return path


def test_bad_flags_are_reported_together_before_anything_heavy_is_imported():
    program = (
        "import sys, pretokenize\n"
        "code = pretokenize.main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    flags = (
        "--sequence_length 0 --validation_fraction 1 --take -1 --num_cpu x --train_tokenizer 259 --tokenizer t5-base"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *flags.split(), "--sequence_lenght", "5"],
        cwd=Path(pretokenize.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert [line.split()[:2] for line in done.stderr.splitlines() if "unknown" not in line] == [
        ["error:", "--sequence_length"],
        ["error:", "--validation_fraction"],
        ["error:", "--take"],
        ["error:", "--num_cpu"],
        ["error:", "--dataset"],
        ["error:", "--save_dir"],
        ["error:", "--train_tokenizer"],
        ["error:", "--tokenizer"],
    ]
    assert "unknown flag --sequence_lenght (did you mean sequence_length?)" in done.stderr


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1", "nan"])
def test_validation_fraction_lies_between_0_and_1(refused, corpus, fraction):
    assert "--validation_fraction must" in refused(corpus, "--validation_fraction", fraction)[0]


def test_paths(refused, corpus, tmp_path):
    assert refused(tmp_path / "missing.txt") == [f"--dataset {tmp_path}/missing.txt: file or folder not found"]
    assert refused(tmp_path / "*.json") == [f"--dataset {tmp_path}/*.json: no file matches this wildcard"]
    assert refused("missing", "--from_json") == ["--dataset missing: file or folder not found"]
    (tmp_path / "folder").mkdir()
    assert "holds neither a dataset saved by `datasets` nor files" in refused(tmp_path / "folder")[0]
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.parquet.gz").touch()
    assert ["unsupported extension" in line for line in refused(tmp_path / "a.*")] == [True, True]


def test_places_that_cannot_be_written_to(refused, corpus, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    assert "file is not a folder" in refused(corpus, save_dir=tmp_path / "file" / "x")[0]
    taken = tmp_path / "out" / "corpus_byt5_16"
    taken.mkdir(parents=True)
    assert refused(corpus) == [f"{taken} exists already (--overwrite replaces it)"]
    with monkeypatch.context() as patch:  # the tests may run as root, who may write everywhere
        patch.setattr(os, "access", lambda *_: False)
        assert "no permission to write" in refused(corpus, save_dir=tmp_path / "new")[0]

    def no_space(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", no_space)
    assert "cannot be written to (Permission denied)" in refused(corpus, save_dir=tmp_path / "new")[0]


def test_zstandard_is_optional(refused, monkeypatch, tmp_path):
    (tmp_path / "a.jsonl.zst").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs `pip install zstandard`" in refused(tmp_path / "a.jsonl.zst")[0]


def test_hub_out_of_reach(refused):
    """Both problems at once: the tests run offline."""
    data, tokenizer = refused("c4", "--dataset_config", "en", tokenizer="t5-base")
    assert data.startswith("--dataset allenai/c4: no such path, and not loadable from the hub (")
    assert tokenizer.startswith("--tokenizer t5-base: no folder with a tokenizer, and not loadable from the hub (")


def test_tokenizers(refused, corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no folder with a tokenizer" in refused(corpus, tokenizer=tmp_path / "empty")[0]
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path / "no_eos")
    assert "has no end-of-sequence token" in refused(corpus, tokenizer=tmp_path / "no_eos")[0]
    assert "yields only" in refused(corpus, "--train_tokenizer", 5000, tokenizer=None)[0]


BAD_FILES = {
    "a.jsonl": (b'{"body": "x", "url": "y"}\n', "a.jsonl: no --text_field 'text' among the columns 'body', 'url'"),
    "b.jsonl": (b'{"text": "x"}\n\n{"text": \n', "b.jsonl: line 3 is not valid JSON"),
    "c.jsonl": (b'{"text": "x"}\n{"text": null}\n', "c.jsonl: document 2 is not text but NoneType"),
    "d.json": (b"[1, 2]", "d.json: row 1 is not a JSON object"),
    "e.json.gz": (gzip.compress(b'{"text": "x"}\n' * 9999)[:50], "e.json.gz: Compressed file ended"),
    "f.jsonl.zst": (b"not compressed", "f.jsonl.zst: "),
    "g.txt": (b"\xff\xfe", "g.txt: 'utf-8' codec can't decode"),
    "h.parquet": (b"no parquet", "h.parquet: "),
    "i.txt": (b"\n \n", "holds no documents"),
    "j.jsonl": (b"", "holds no documents"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(refused, tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    lines = refused(tmp_path / name)
    assert len(lines) == 1 and message in lines[0]


def test_missing_text_fields_of_other_sources(refused, tmp_path):
    table = {"body": ["x"], "url": ["y"]}
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "saved")
    for source in ("a.parquet", "saved"):
        assert refused(tmp_path / source)[0].endswith(": no --text_field 'text' among the columns 'body', 'url'")
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(table)}).save_to_disk(tmp_path / "no_train")
    assert refused(tmp_path / "no_train")[0].endswith("has no split named train, only validation")


def test_too_little_text_for_a_block(refused, corpus, tmp_path):
    lines = refused(corpus, length=10_000)
    assert [" split's " in line and "not one block" in line for line in lines] == [True, True]
    (tmp_path / "one.txt").write_text("a single short document")  # of one block and a half
    assert "split's 0 documents have only 0 tokens" in refused(tmp_path / "one.txt")[0]
    (tmp_path / "train.json").write_text(json.dumps({"text": "long enough " * 50}))
    (tmp_path / "validation.json").write_text(json.dumps({"text": "short"}))
    assert "the validation split's 1 documents have only 6 tokens" in refused(tmp_path / "*.json")[0]


def test_flags_without_effect_are_named(corpus, byt5, tmp_path, capsys):
    for name in ("train.txt", "validation.txt", "other.txt"):
        (tmp_path / name).write_text(corpus.read_text())
    argv = ["--dataset", tmp_path / "*[nr].txt", "--save_dir", tmp_path / "out", "--tokenizer", byt5, "--num_cpu", 1]
    argv += ["--dataset_config", "en", "--text_field", "body", "--validation_fraction", 0.2]
    assert pretokenize.main([str(part) for part in argv]) == 0
    warnings = [line for line in capsys.readouterr().err.split("\n") if line.startswith("warning: ")]
    assert [
        next(name for name in ("other.txt", "config", "field", "fraction") if name in line) for line in warnings
    ] == [*("other.txt", "config", "field", "fraction")]


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("c4-train.*.json.gz", "c4-train"),
        ("c4-*.json.gz", "c4"),
        ("part-[0-9]*.json", "part"),
        ("**/*.json.gz", "corpus_folder"),
        ("./", "corpus_folder"),
        ("c4-train.v2.0.json.gz", "c4-train.v2.0"),
    ],
)
def test_names_of_local_data(tmp_path, monkeypatch, dataset, name):
    folder = tmp_path / "corpus_folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for file in ("c4-train.v2.0.json.gz", "part-0.json"):
        (folder / file).touch()
    assert find_source(dataset, False, [], []).name == name


@pytest.mark.parametrize(
    ("dataset", "name"), [("c4", "allenai/c4"), ("Skylion007/openwebtext", "Skylion007/openwebtext")]
)
def test_names_of_hub_data(dataset, name):
    source = find_source(dataset, False, [], [])
    assert (source.kind, source.name, source.origin) == ("hub", name, name)
