"""Data that is damaged, odd or made to do harm: what cannot be used is counted or refused in one line."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import resource
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import zstandard
from conftest import BLOCK, write_blocks
from streaming_helpers import VOCABULARY, group, made_up, open_shards, write_lines
from transformers import AutoTokenizer

import pretokenize
from peft_pretraining.checkpoint.folder_lock import FolderLock
from peft_pretraining.data import lines, streaming
from peft_pretraining.data.blocks import TokenBlocks, evaluation_batches, training_batches
from peft_pretraining.data.documents import Complaints, SampleMaker
from peft_pretraining.data.folder import read_arguments
from peft_pretraining.data.json_rows import json_objects, json_rows
from peft_pretraining.data.pieces import open_pieces
from peft_pretraining.data.shards import DataError, document_text, find_local_shards
from peft_pretraining.data.sources import find_source
from peft_pretraining.data.streaming import in_order_of_files
from peft_pretraining.data.tally import Tally
from peft_pretraining.data.tokenizer import load_tokenizer, train_tokenizer
from peft_pretraining.flags import ConfigError
from peft_pretraining.training.evaluate import evaluate

LENGTH = 16
DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
GOOD = [json.dumps({"text": text}) for text in made_up(300)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(made_up(300), VOCABULARY, 1).save_pretrained(folder)
    return folder


@pytest.fixture
def command(bpe, tmp_path, capsys):
    """A function that runs the command and returns its exit code, its lines of errors and notes, and the result."""

    def call(dataset, *extra, length=LENGTH):
        argv = ["--dataset", dataset, "--sequence_length", length, "--save_dir", tmp_path / "out", "--num_cpu", 1]
        code = pretokenize.main([str(part) for part in [*argv, "--tokenizer", bpe, *extra]])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        said = [line for line in printed.err.replace("\r", "\n").split("\n") if line.startswith(("error: ", "note: "))]
        return code, said, Path(printed.out.splitlines()[-1]) if printed.out else None

    return call


def documents(path: Path, **options) -> list[str]:
    """The texts that pre-tokenisation reads from a file."""
    source = find_source(str(path), False, [], [])
    return [text for piece in open_pieces(source, None, "text", **options)["train"] for text in piece(Tally())]


def streamed_documents(path: Path) -> list[str]:
    """The texts that are streamed from a file of JSON lines, a copy of which becomes the shards."""
    folder = path.parent / "shards"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / path.name).write_bytes(path.read_bytes())
    found = (document_text(document.data)[0] for document in in_order_of_files(open_shards(folder).train))
    return [text for text in found if text is not None]


# Rows that hold no document.

ODD_ROWS = {
    "null": '{"text": null}',
    "number": '{"text": 7}',
    "not a number": '{"text": NaN}',
    "nested text": '{"text": {"text": "x"}}',
    "list": '{"text": ["x"]}',
    "no field": '{"other": "x"}',
    "not an object": '"text"',
    "not JSON": '{"text": "x"',
    "deep": DEEP,
    "long number": '{"text": "x", "n": ' + "1" * 5000 + "}",
    "twice": '{"text": "x", "text": "y"}',
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_a_row_that_is_no_document_is_passed_over_and_counted(command, tmp_path, name):
    (tmp_path / "a.jsonl").write_text("\n".join([*GOOD[:200], ODD_ROWS[name], *GOOD[200:]]) + "\n")
    code, said, result = command(tmp_path / "a.jsonl", "--validation_fraction", 0.1)
    assert code == 0
    (note,) = (line for line in said if "passed over" in line)
    assert note.startswith(f"note: 1 of 301 rows were passed over: {tmp_path}/a.jsonl: ") and "201" in note
    described = json.loads((result / "args.json").read_text())
    assert described["rows_passed_over"] == 1
    assert described["train"]["documents"] + described["validation"]["documents"] == 300
    assert document_text(ODD_ROWS[name].encode())[0] is None  # streaming passes over the same


def test_more_than_one_in_a_hundred_are_refused_with_their_numbers(command, tmp_path):
    rows = [*GOOD[:100], '{"text": null}', *GOOD[100:200], '{"text": 3}', "", "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    code, said, _ = command(tmp_path / "a.jsonl")
    assert (code, len(said)) == (2, 1) and not (tmp_path / "out").exists()
    assert f"{tmp_path}/a.jsonl: document 101 is not text but NoneType; also document 202, line 204" in said[0]
    assert "3 of 203 rows cannot be used" in said[0]


def test_the_wrong_field_is_noticed_long_before_the_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 5000)
    tally = Tally()
    (piece,) = open_pieces(find_source(str(tmp_path / "a.jsonl"), False, [], []), None, "text")["train"]
    with pytest.raises(ConfigError, match=r"no --text_field 'text' among the columns 'body'"):
        list(piece(tally))
    assert tally.read == 101


def test_nulls_of_other_sources_are_passed_over_too(command, tmp_path):
    texts = [*made_up(200), None]
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        code, said, _ = command(tmp_path / name, "--validation_fraction", 0.1)
        assert code == 0 and any("1 of 201 rows were passed over" in line and "201" in line for line in said)


def test_documents_without_text_and_tokens_without_a_block_are_counted(command, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([*GOOD, '{"text": " "}', '{"text": ""}']))
    code, said, result = command(tmp_path / "a.jsonl", "--validation_fraction", 0.1)
    described = json.loads((result / "args.json").read_text())
    assert code == 0 and "note: 2 of 302 documents hold no text: only their end token is used" in said
    for split in ("train", "validation"):
        tail = described[split]["tokens"] % LENGTH
        line = f"note: {split}: the last {tail} of {described[split]['tokens']} tokens fill no block and are not used"
        assert (line in said) == (tail > 0)


# Text.


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.txt", "a.txt.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    content = 'first "text"\n\nsecond' if ".txt" in name else '{"text": "first \\"text\\""}\n{"text": "second"}\n'
    if name == "a.json":
        content = f"[{content.replace(chr(10), ',', 1)}]"
    data = b"\xef\xbb\xbf" + content.encode()
    data = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data) if name.endswith("zst") else data
    (tmp_path / name).write_bytes(data)
    assert documents(tmp_path / name) == ['first "text"', "second"]
    if name.endswith(("jsonl", "jsonl.gz")):
        assert streamed_documents(tmp_path / name) == ['first "text"', "second"]


def test_lines_end_at_line_feeds_alone(tmp_path):
    odd = "a\x1cb\u2028c\x85d\x0be\x0cf\rg\r\nh \u200b\0i"
    (tmp_path / "a.txt").write_text(f"{odd}\n\n{odd}\r\n \t\r\n{odd}\n\u2028\nend\n", newline="")
    assert documents(tmp_path / "a.txt") == [odd, odd, f"{odd}\n\u2028\nend"]
    line = json.dumps({"text": odd}, ensure_ascii=False).replace("\\u2028", "\u2028")
    (tmp_path / "a.jsonl").write_text(f"{line}\r\n{line}\n \t\n{line}", newline="")
    assert documents(tmp_path / "a.jsonl") == streamed_documents(tmp_path / "a.jsonl") == [odd] * 3


def test_a_text_file_with_a_document_that_is_no_utf8(command, tmp_path):
    texts = [text.encode() for text in made_up(200)]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join([*texts, b"caf\xe9"]))
    code, said, _ = command(tmp_path / "a.txt", "--validation_fraction", 0.1)
    assert code == 0
    assert any("1 of 201 rows were passed over" in line and "document 201" in line for line in said)


def test_a_json_array_is_read_item_by_item(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_pretraining.data.json_rows._CHUNK", 7)
    rows = [{"text": text, "n": [1, {"a": "]},"}]} for text in made_up(50)]
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(" \n" + json.dumps(rows, indent=indent) + "\n ")
        assert [row for _, row in json_objects(path)] == rows
    path.write_text("[]")
    assert list(json_objects(path)) == []
    for content, reason in {
        '[{"text": "x"}, 1]': "row 2 is not a JSON object",
        '[{"text": "x"} {"text": "y"}]': "row 1 is followed by",
        '[{"text": "x"}': "row 1 is followed by",
        '[{"text": "x"},]': "row 2 is not valid JSON",
        '[{"text": "x"}] {}': "something follows",
        f"[{DEEP}]": "row 1 is nested too deeply",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=reason):
            list(json_objects(path))


def test_option_tasks_read_deep_json_with_a_row_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + DEEP)
    with pytest.raises(ValueError, match="line 3 is nested too deeply"):
        list(json_objects(tmp_path / "a.jsonl"))


# Size.


def test_a_document_beyond_the_limit_is_passed_over_without_being_held(command, tmp_path):
    huge = json.dumps({"text": "x" * 30_000_000})
    for name in ("train.jsonl.gz", "validation.jsonl.gz"):
        with gzip.open(tmp_path / name, "wt", compresslevel=1) as file:
            file.writelines(line + "\n" for line in (*GOOD[:150], huge, *GOOD[150:]))
    with gzip.open(tmp_path / "one.txt.gz", "wt", compresslevel=1) as file:
        file.writelines(["x" * 99 + "\n"] * 200_000)
    assert os.path.getsize(tmp_path / "train.jsonl.gz") < 300_000
    code, said, result = command(tmp_path / "*.jsonl.gz", "--max_document_mb", 1)
    assert code == 0 and json.loads((result / "args.json").read_text())["rows_passed_over"] == 2
    assert any("line 151 is longer than --max_document_mb allows (30 MB)" in line for line in said)
    code, said, _ = command(tmp_path / "one.txt.gz", "--max_document_mb", 1)
    assert code == 2 and "document 1 is longer than --max_document_mb allows (20 MB)" in said[0]

    problems: list[str] = []
    shards = find_local_shards(str(tmp_path), "--base_dir", problems, [], max_document_mb=1)
    found = list(in_order_of_files(shards.train))
    assert not problems and len(found) == 301
    assert document_text(found[150].data) == (None, "is longer than --max_document_mb allows (30 MB)")
    assert max(len(document.data) for document in found) < 1000
    (last,) = (line for line in shards.train[0].lines() if line.number == 300)  # places count what was not kept
    (again,) = shards.train[0].lines(last.offset, 300)
    assert again == last and document_text(again.data)[0] == json.loads(GOOD[-1])["text"]


def test_windows_of_long_documents_end_early(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 1000)
    for split in ("train", "validation"):
        write_lines(tmp_path / f"c4-{split}.json", GOOD)
    train = open_shards(tmp_path).train
    windows = streaming.read_windows(train, 0, 8192, streaming.Cursor())
    read = [next(windows) for _ in range(10)]
    assert all(1000 <= sum(len(d.data) for d in w.documents) < 1500 for w in read)
    assert [d.line for w in read for d in w.documents] == list(range(sum(len(w.documents) for w in read)))


def test_a_single_document_has_its_end_held_out(command, bpe, tmp_path):
    text = " ".join(made_up(400))
    (tmp_path / "one.txt").write_text(text)
    code, said, result = command(tmp_path / "one.txt", "--validation_fraction", 0.05)
    assert code == 0 and any("the documents are too few to hold out whole ones" in line for line in said)
    data = datasets.load_from_disk(str(result))
    stream = [*AutoTokenizer.from_pretrained(bpe)(text, add_special_tokens=False)["input_ids"], 0]
    blocks = len(stream) // LENGTH
    held_out = round(0.05 * blocks)
    found = {split: np.concatenate(data[split]["input_ids"]) for split in data}
    assert np.array_equal(found["train"], stream[: (blocks - held_out) * LENGTH])
    assert np.array_equal(found["validation"], stream[(blocks - held_out) * LENGTH : blocks * LENGTH])
    assert json.loads((result / "args.json").read_text())["train"]["documents"] == 1
    assert len(TokenBlocks(result, "validation", LENGTH)) == held_out


# Files and folders.


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_files_are_named_in_one_line(command, tmp_path, name, damage):
    path = tmp_path / name
    text = "\n".join(GOOD).encode()
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pa.table({"text": made_up(300)}), path, write_page_checksum=True)
    else:
        compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress
        path.write_bytes(compress(text))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) * 3 // 4]
    else:
        data[-6 if name.endswith("gz") else len(data) - 2] ^= 1
    path.write_bytes(data)
    code, said, _ = command(path)
    assert code == 2 and len(said) == 1 and said[0].startswith(f"error: {path}: ")
    assert not (tmp_path / "out").exists()


def test_places_that_are_no_files(command, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name, reason in {
        "pipe.jsonl": "a pipe or device, not a file",
        "gone.jsonl": "a link that leads nowhere",
        "loop.jsonl": "a link that leads nowhere",
        "x" * 5000: "a name of 5000 bytes",
        "a\0b.jsonl": "must not contain NUL",
    }.items():
        code, said, _ = command(tmp_path / name)
        assert code == 2 and len(said) == 1 and reason in said[0]
    for place in (tmp_path, tmp_path / "*.jsonl"):  # data that goes missing is not just left out
        code, said, _ = command(place)
        assert code == 2 and len(said) == 3
    problems: list[str] = []
    assert find_local_shards(str(tmp_path), "--base_dir", problems, []) is None and len(problems) == 3
    problems.clear()
    assert find_local_shards("x" * 5000, "--base_dir", problems, []) is None and "no such folder" in problems[0]


def test_folders_in_folders_are_pointed_to(command, tmp_path):
    write_lines(tmp_path / "data" / "inner" / "a.jsonl", GOOD)
    code, said, _ = command(tmp_path / "data")
    assert code == 2 and f"'{tmp_path}/data/**/*.jsonl'" in said[0]
    assert command(tmp_path / "data" / "**" / "*.jsonl", "--validation_fraction", 0.1)[0] == 0


# Writing.


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(command, tmp_path):
    write_lines(tmp_path / "a.jsonl", GOOD * 20)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, old[1]))
    try:
        code, said, _ = command(tmp_path / "a.jsonl", "--validation_fraction", 0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code == 1 and len([line for line in said if line.startswith("error: ")]) == 1
    assert "cannot be written (File too large)" in said[-1] and not (tmp_path / "out").exists()


def test_one_command_at_a_time_makes_a_result(command, tmp_path):
    write_lines(tmp_path / "a.jsonl", GOOD)
    lock = tmp_path / "out" / f"a_bpe_{LENGTH}.lock"
    lock.mkdir(parents=True)
    with FolderLock(lock):
        code, said, _ = command(tmp_path / "a.jsonl", "--validation_fraction", 0.1)
        assert code == 2 and len(said) == 1 and f"process {os.getpid()} on" in said[0]
    code, _, result = command(tmp_path / "a.jsonl", "--validation_fraction", 0.1)
    assert code == 0 and os.listdir(tmp_path / "out") == [result.name]


def test_a_result_whose_replacement_was_killed_comes_back(command, tmp_path):
    write_lines(tmp_path / "a.jsonl", GOOD)
    result = command(tmp_path / "a.jsonl", "--validation_fraction", 0.1)[2]
    result.rename(result.with_name(result.name + ".old"))
    code, said, _ = command(tmp_path / "a.jsonl", "--validation_fraction", 0.1)
    assert code == 2 and said == [f"error: {result} exists already (--overwrite replaces it)"]
    assert os.listdir(tmp_path / "out") == [result.name]


@pytest.mark.parametrize("length", [0, 1, -3])
def test_blocks_of_one_token_are_refused(command, tmp_path, length):
    write_lines(tmp_path / "a.jsonl", GOOD)
    code, said, _ = command(tmp_path / "a.jsonl", length=length)
    assert code == 2 and said[0].startswith("error: --sequence_length must be an integer of at least 2")


# Data folders that somebody else made.

WRONG_ARGUMENTS = [
    [],
    "text",
    {"sequence_length": [BLOCK]},
    {"sequence_length": 10**400},
    {"sequence_length": True},
    {"sequence_length": 0},
    {"sequence_length": BLOCK, "largest_token_id": "9"},
    {"sequence_length": BLOCK, "tokenizer": ["t5"]},
    {"sequence_length": BLOCK, "train": [1]},
    {"sequence_length": BLOCK, "train": {"blocks": "many"}},
    {"sequence_length": BLOCK, "vocab_size": -1},
]


@pytest.mark.parametrize("content", [*map(json.dumps, WRONG_ARGUMENTS), "[" * 100_000, "\0", ""])
def test_descriptions_of_the_wrong_types(tmp_path, content):
    folder = write_blocks(tmp_path / "data", train=8, validation=2)
    (folder / "args.json").write_text(content)
    with pytest.raises(ValueError, match=r"^args.json[^\n]*$"):
        read_arguments(folder)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", 7, None, ["x"], "missing.arrow", "", "a\0b"])
def test_only_files_of_the_folder_are_read(tmp_path, name):
    folder = write_blocks(tmp_path / "data", train=8, validation=2)
    (folder / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match=r"no file of this folder|is missing"):
        TokenBlocks(folder, "train", BLOCK)


def arrow_file(folder: Path) -> Path:
    return next((folder / "train").glob("*.arrow"))


def test_arrow_files_that_are_damaged(tmp_path):
    folder = write_blocks(tmp_path / "data", train=64, validation=2)
    described = {**json.loads((folder / "args.json").read_text()), "train": {"blocks": 64}}
    (folder / "args.json").write_text(json.dumps(described))
    file = arrow_file(folder)
    data = file.read_bytes()
    for content in (data[: len(data) // 2], data[:10], b"", b"\0" * 1000, data[:400] + b"\xff" * 400 + data[800:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"^train/data-00000-of-00001.arrow is damaged|blocks instead of 64"):
            TokenBlocks(folder, "train", BLOCK)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["a", "b"]] * 4),
        pa.array([[1.5] * BLOCK] * 4),
        pa.array([None, [1] * BLOCK], pa.list_(pa.int32(), BLOCK)),
        pa.array([[1] * (BLOCK - 1) + [None]] * 4, pa.list_(pa.int32(), BLOCK)),
        pa.array([1, 2, 3]),
    ],
)
def test_arrow_files_of_something_else(tmp_path, column):
    folder = write_blocks(tmp_path / "data", train=8, validation=2)
    table = pa.table({"input_ids": column})
    with pa.ipc.new_stream(str(arrow_file(folder)), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"no column input_ids of token ids|not all of|token ids are missing"):
        TokenBlocks(folder, "train", BLOCK)


@pytest.mark.parametrize(("wrong", "reason"), [(128, "beyond the model's vocabulary of 128"), (-1, "is negative")])
@pytest.mark.parametrize("workers", [0, 1])
def test_ids_that_the_model_does_not_have_are_named_with_their_row(tmp_path, wrong, reason, workers):
    folder = write_blocks(tmp_path / "data", train=8, validation=2)
    ids = np.zeros((8, BLOCK), dtype=np.int32)
    ids[5, 3] = wrong
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), BLOCK)})
    with pa.ipc.new_stream(str(arrow_file(folder)), table.schema) as writer:
        writer.write_table(table)
    blocks = TokenBlocks(folder, "train", BLOCK // 2)
    batches = training_batches(
        blocks, seed=0, start=0, batch_size=4, accumulation=1, workers=workers, group=group(), vocabulary=128
    )
    message = rf"^{folder}: split train, row 5: token id {wrong} (is )?{reason}"
    with pytest.raises(DataError, match=message):
        for _ in range(4):  # an epoch
            next(batches)
    with pytest.raises(DataError, match=message):
        list(evaluation_batches(blocks, max_samples=16, batch_size=4, group=group(), vocabulary=128))


def test_an_evaluation_without_a_target_ends_in_one_line():
    model = torch.nn.Module()
    with pytest.raises(DataError, match="holds nothing to predict"):
        evaluate(model, [], group(), lambda: False)


# Tokenizers.


def test_tokenizer_folders_that_are_damaged_or_hostile(bpe, tmp_path):
    good, settings = (json.loads((bpe / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    code = "open(__file__ + '.was_run', 'w')\nclass T: pass\n"
    auto_map = {**settings, "auto_map": {"AutoTokenizer": ["code.T", None]}}
    huge = {**good, "added_tokens": [{**token, "id": 2**31 + token["id"]} for token in good["added_tokens"]]}
    for name, files in {
        "sentencepiece": {"spiece.model": "x"},
        "cut": {"tokenizer.json": json.dumps(good)[:500], "tokenizer_config.json": json.dumps(settings)},
        "lists": {"tokenizer.json": "[]", "tokenizer_config.json": "[]"},
        "deep": {"tokenizer.json": "[" * 100_000, "tokenizer_config.json": "{}"},
        "code": {"tokenizer.json": json.dumps(good), "tokenizer_config.json": json.dumps(auto_map), "code.py": code},
        "end": {"tokenizer.json": json.dumps(good), "tokenizer_config.json": json.dumps({"eos_token": [1]})},
        "huge": {"tokenizer.json": json.dumps(huge), "tokenizer_config.json": json.dumps(settings)},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content)
        try:
            ids = load_tokenizer(str(folder)).get_vocab().values()
            assert name in ("huge", "code") and max(ids) < 2**31  # numbered anew by tokenizers; the code not needed
        except ConfigError as error:
            (problem,) = error.problems
            assert "\n" not in problem and not problem.rstrip(")").endswith(":"), problem
            assert name != "sentencepiece" or problem.endswith("its spiece.model cannot be read")
        assert not list(folder.glob("*.was_run"))


def test_a_tokenizer_whose_library_is_missing(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_text("x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(ConfigError, match="reading it needs `pip install sentencepiece`"):
        load_tokenizer(str(tmp_path))


def test_bad_lines_are_counted_in_streams(bpe, tmp_path):
    """As `Complaints` counts them: deep JSON does not end the run."""
    for split in ("train", "validation"):
        write_lines(tmp_path / f"c4-{split}.json", [*GOOD[:20], DEEP, *GOOD[20:40]])
    train = open_shards(tmp_path).train
    maker, complaints = SampleMaker(AutoTokenizer.from_pretrained(bpe), LENGTH), Complaints(train)
    made = maker.__getitems__(list(in_order_of_files(train)))
    complaints.add(made["complaints"], 41)
    assert made["complaints"] == [[0, 20, "is nested too deeply to be read"]]
    assert (made["attention_mask"].sum(1) == 1).nonzero().tolist() == [[20]]


def test_lines_are_cut_off_at_the_limit_and_counted_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"12345\n1234567\n12345678" * 2 + b"\n1\n" + b"x" * 50)
    with lines.LineReader(open(tmp_path / "a.txt", "rb"), 6) as reader:
        found = [(bytes(line), getattr(line, "size", len(line))) for line in reader]
    assert found == [(b"12345\n", 6), (b"", 8), (b"", 14), (b"", 8), (b"", 9), (b"1\n", 2), (b"", 50)]
    rows = list(json_rows(tmp_path / "a.txt", 6))
    assert [name for name, _ in rows] == [f"line {number}" for number in range(1, 8)]
