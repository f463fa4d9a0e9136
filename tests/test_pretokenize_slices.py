"""`pretokenize.py` in slices: together they are what one command makes, and joining them copies nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from test_pretokenize import LENGTH, made_up, write_json_lines
from transformers import ByT5Tokenizer

import pretokenize
from peft_pretraining.data import block_writer, splits
from peft_pretraining.data.blocks import TokenBlocks

SLICES = 3
FILES = 7


@pytest.fixture(scope="module")
def byt5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "byt5"
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path) -> str:
    """Files of different lengths, without a validation split; every document has its number in it."""
    texts = [f"<{number}> {text}" for number, text in enumerate(made_up(210))]
    ends = [0, 10, 60, 61, 100, 160, 200, 210]
    for number in range(FILES):
        write_json_lines(tmp_path / f"part-{number}.jsonl", texts[ends[number] : ends[number + 1]])
    return str(tmp_path / "part-*.jsonl")


@pytest.fixture
def argv(byt5, corpus, tmp_path):
    def build(*extra, dataset=corpus, save_dir=tmp_path / "out") -> list[str]:
        words = ["--dataset", dataset, "--tokenizer", byt5, "--sequence_length", LENGTH, "--save_dir", save_dir]
        return [str(word) for word in [*words, "--validation_fraction", 0.1, "--num_cpu", 1, *extra]]

    return build


def make(argv: list[str], capsys) -> Path:
    assert pretokenize.main(argv) == 0
    return Path(capsys.readouterr().out.splitlines()[-1])


def refused(argv: list[str], capsys) -> list[str]:
    assert pretokenize.main(argv) == 2
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines() if "error: " in line]


def documents(folder: Path, split: str) -> list[list[int]]:
    """Documents as they can be read back: tokens between EOS; what a cut block or the last remainder loses differs."""
    stream = np.concatenate(datasets.load_from_disk(str(folder))[split]["input_ids"])
    return [part.tolist() for part in np.split(stream, np.flatnonzero(stream == 1) + 1)]


def counts(folder: Path) -> dict:
    return json.loads((folder / "args.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_equals_unsliced(merged: Path, whole: Path) -> None:
    """The same documents in each split, and the same numbers of documents, tokens and blocks."""
    for split in ("train", "validation"):
        here, there = counts(merged)[split], counts(whole)[split]
        assert here == {**there, "slices": here["slices"]}
        ours, theirs = documents(merged, split), documents(whole, split)
        # Whole documents, in their order: all but those that a slice's end or the dropped remainder cuts.
        known = set(map(tuple, theirs))
        intact = [document for document in ours if tuple(document) in known]
        assert len(intact) >= there["documents"] - 2 * here["slices"] - 1
        positions = [theirs.index(document) for document in intact]
        assert positions == sorted(positions) and len(set(positions)) == len(positions)
        # And not a token more or less.
        tokens = [np.sort(np.concatenate([np.array(document) for document in both])) for both in (ours, theirs)]
        assert tokens[0].size == tokens[1].size and (tokens[0] != tokens[1]).mean() < 0.05


@pytest.mark.parametrize("extra", [(), ("--take", 150)], ids=["files", "take"])
def test_merged_slices_equal_one_command(argv, capsys, tmp_path, extra):
    whole = make(argv(*extra, save_dir=tmp_path / "whole"), capsys)
    for shard in (2, 0, 1):
        folder = make(argv(*extra, "--num_shards", SLICES, "--shard", shard), capsys)
        assert folder == tmp_path / "out" / f"part_byt5_{LENGTH}.slices" / f"{shard:05d}-of-{SLICES:05d}"
    merged = make(argv(*extra, "--num_shards", SLICES, "--merge"), capsys)
    assert merged.name == whole.name
    assert_equals_unsliced(merged, whole)
    for name in ("tokenizer_config.json", "dataset_dict.json"):
        assert (merged / name).read_bytes() == (whole / name).read_bytes()
    assert counts(merged)["largest_token_id"] == counts(whole)["largest_token_id"]


def test_every_document_is_in_exactly_one_slice(argv, capsys, corpus, tmp_path):
    """Counted by the numbers in them, over both splits of all slices, remainders included."""
    seen = []
    for shard in range(SLICES):
        folder = make(argv("--num_shards", SLICES, "--shard", shard), capsys)
        for split in ("train", "validation"):
            part = json.loads((folder / "slice.json").read_text())["splits"][split]
            files = [datasets.Dataset.from_file(str(folder / split / name))["input_ids"] for name in part["files"]]
            tokens = [token for rows in files for row in rows for token in row] + part["remainder"]
            assert len(tokens) == part["tokens"]
            text = bytes(token - 3 for token in tokens if token >= 3).decode()
            seen += [int(piece.split(">")[0]) for piece in text.split("<")[1:]]
            assert tokens.count(1) == part["documents"]
    assert sorted(seen) == list(range(210))


def test_the_order_in_which_slices_are_made_changes_no_byte(argv, capsys, tmp_path):
    results = []
    for folder, order in (("a", (0, 1, 2)), ("b", (2, 1, 0, 1, 2))):
        for shard in order:
            make(argv("--num_shards", SLICES, "--shard", shard, save_dir=tmp_path / folder), capsys)
        results.append(content(make(argv("--num_shards", SLICES, "--merge", save_dir=tmp_path / folder), capsys)))
        del results[-1]["args.json"]  # has --save_dir
    assert results[0] == results[1]


def test_slices_of_an_older_version_are_not_mixed_with_new_ones(argv, capsys, tmp_path):
    for shard in range(SLICES):
        make(argv("--num_shards", SLICES, "--shard", shard), capsys)
    for older, file in enumerate(sorted((tmp_path / "out").rglob("slice.json"))):
        description = json.loads(file.read_text())
        for part in description["splits"].values():
            assert part["dtype"] == "uint16"
            if older == 1:
                del part["dtype"]
        file.write_text(json.dumps(description))
    (problem,) = refused(argv("--num_shards", SLICES, "--merge"), capsys)
    assert problem == "slice 1: its tokens are int32, those of slice 0 uint16; make it again"


def test_merging_copies_nothing_and_the_result_stands_alone(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(block_writer, "TOKENS_PER_RECORD_BATCH", 10 * LENGTH)
    monkeypatch.setattr(block_writer, "TOKENS_PER_FILE", 100 * LENGTH)  # several files a slice
    monkeypatch.setattr(splits, "token_dtype", lambda largest_id: np.dtype("int32"))  # more bytes than folders take
    for shard in range(SLICES):
        make(argv("--num_shards", SLICES, "--shard", shard), capsys)
    slices = {path.stat().st_ino: path for path in (tmp_path / "out").rglob("*.arrow")}

    def blocks_on_disk() -> int:
        return int(subprocess.check_output(["du", "-s", "-B1", tmp_path / "out"]).split()[0])

    before = blocks_on_disk()
    merged = make(argv("--num_shards", SLICES, "--merge"), capsys)
    files = list(merged.rglob("*.arrow"))
    assert len(slices) > 2 * SLICES and len(files) in (len(slices) + 1, len(slices) + 2)
    new = [path for path in files if path.stat().st_ino not in slices]
    assert sum(path.stat().st_size for path in new) < 2 * SLICES * LENGTH * 4 + 4000  # the joined remainders
    extra = blocks_on_disk() - before
    assert extra < 120_000 < sum(path.stat().st_size for path in slices.values()), extra

    expected = content(merged)
    shutil.rmtree(tmp_path / "out" / f"part_byt5_{LENGTH}.slices")
    (tmp_path / "elsewhere").mkdir()
    moved = merged.rename(tmp_path / "elsewhere" / "data")
    assert content(moved) == expected
    blocks = TokenBlocks(moved, "train", LENGTH)
    assert len(blocks) == counts(moved)["train"]["blocks"]
    stored = np.array(datasets.load_from_disk(str(moved))["train"]["input_ids"])
    assert np.array_equal(blocks.__getitems__([0, len(blocks) - 1])["input_ids"].numpy(), stored[[0, -1]])


def test_without_hard_links_symbolic_ones_are_made_and_said(argv, capsys, monkeypatch, tmp_path):
    for shard in range(SLICES):
        make(argv("--num_shards", SLICES, "--shard", shard), capsys)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
        assert pretokenize.main(argv("--num_shards", SLICES, "--merge")) == 0
    out, err = capsys.readouterr()
    assert "warning: no hard links here:" in err and "must stay beside it" in err
    (tmp_path / "out").rename(tmp_path / "moved as a whole")
    merged = tmp_path / "moved as a whole" / Path(out.strip()).name
    assert len(TokenBlocks(merged, "train", LENGTH)) == counts(merged)["train"]["blocks"]


def test_own_validation_split_is_made_once(byt5, capsys, tmp_path, argv):
    for part in range(4):
        write_json_lines(tmp_path / f"c4-train.{part}.json", made_up(50, seed=part))
    write_json_lines(tmp_path / "c4-validation.0.json", made_up(30, seed=9))
    pattern = tmp_path / "c4-*.json"
    whole = make(argv(dataset=pattern, save_dir=tmp_path / "whole"), capsys)
    parts = [make(argv("--num_shards", 4, "--shard", shard, dataset=pattern), capsys) for shard in range(4)]
    described = [json.loads((part / "slice.json").read_text())["splits"] for part in parts]
    assert [part["validation"]["documents"] for part in described] == [30, 0, 0, 0]
    assert [part["train"]["documents"] for part in described] == [50] * 4
    merged = make(argv("--num_shards", 4, "--merge", dataset=pattern), capsys)
    assert_equals_unsliced(merged, whole)
    assert documents(merged, "validation") == documents(whole, "validation")


def test_slices_of_a_saved_dataset_and_of_a_hub_dataset(byt5, capsys, monkeypatch, argv, tmp_path):
    rows = [f"<{number}> {text}" for number, text in enumerate(made_up(120))]
    monkeypatch.setattr("peft_pretraining.data.pieces.ROWS_PER_PIECE", 25)
    data = datasets.Dataset.from_dict({"text": rows, "n": range(120)})
    data.save_to_disk(tmp_path / "saved")
    streamed = datasets.IterableDatasetDict({"train": data.to_iterable_dataset(num_shards=5)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, streaming: streamed)
    for dataset in (tmp_path / "saved", "someone/something"):
        whole = make(argv(dataset=dataset, save_dir=tmp_path / "whole"), capsys)
        assert sum(counts(whole)[split]["documents"] for split in ("train", "validation")) == 120
        for shard in range(SLICES):
            make(argv("--num_shards", SLICES, "--shard", shard, dataset=dataset), capsys)
        assert_equals_unsliced(make(argv("--num_shards", SLICES, "--merge", dataset=dataset), capsys), whole)


def start(argv: list[str], shard: int) -> subprocess.Popen:
    """A slice in a process of its own; as Slurm does it, the number comes from the environment."""
    return subprocess.Popen(
        [sys.executable, pretokenize.__file__, *argv],
        **{"env": {**os.environ, "SLURM_ARRAY_TASK_ID": str(shard)}, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )


def kill_while_writing(process: subprocess.Popen, folder: Path) -> None:
    end = time.monotonic() + 100
    while not (folder.with_name(folder.name + ".tmp") / "train").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not folder.exists()


@pytest.mark.slow
def test_a_killed_slice_is_made_again_and_no_other(argv, capsys, tmp_path):
    flags = argv("--num_shards", SLICES)
    write_json_lines(tmp_path / "part-3.jsonl", made_up(6000))  # slice 1 takes a while
    one, two, three = (tmp_path / "out" / f"part_byt5_{LENGTH}.slices" / f"0000{i}-of-00003" for i in range(SLICES))
    for shard in (0, 2):
        make([*flags, "--shard", str(shard)], capsys)
    times = {path: path.stat().st_mtime_ns for folder in (one, three) for path in folder.rglob("*")}
    kill_while_writing(start(flags, 1), two)
    (message,) = refused([*flags, "--merge"], capsys)
    assert message == f"slice 1 is being made, or its command was killed: run the same command with --shard 1 ({two})"

    for shard in range(SLICES):
        make([*flags, "--shard", str(shard)], capsys)
    assert {path: path.stat().st_mtime_ns for folder in (one, three) for path in folder.rglob("*")} == times
    assert not list(two.parent.glob("*.tmp"))
    merged = make([*flags, "--merge"], capsys)
    assert counts(merged)["train"]["documents"] + counts(merged)["validation"]["documents"] == 6171
    assert_equals_unsliced(merged, make(argv(save_dir=tmp_path / "whole"), capsys))


@pytest.mark.slow
def test_concurrent_processes(argv, capsys, tmp_path):
    flags = argv("--num_shards", SLICES)
    running = [start(flags, shard) for shard in range(SLICES)]
    kill_while_writing(running[1], tmp_path / "out" / f"part_byt5_{LENGTH}.slices" / "00001-of-00003")
    running[1] = start(flags, 1)
    assert [process.wait(timeout=200) for process in running] == [0, 0, 0]
    whole = make(argv(save_dir=tmp_path / "whole"), capsys)
    assert_equals_unsliced(make([*flags, "--merge"], capsys), whole)


def test_merge_names_every_slice_that_is_no_good(argv, capsys, tmp_path):
    folder = tmp_path / "out" / f"part_byt5_{LENGTH}.slices"
    for shard in range(5):
        make(argv("--num_shards", 6, "--shard", shard), capsys)
    (arrow,) = (folder / "00001-of-00006" / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-8])
    next((folder / "00002-of-00006" / "train").glob("*.arrow")).unlink()
    shutil.rmtree(folder / "00003-of-00006")
    make(argv("--num_shards", 6, "--shard", 3, "--seed", 7), capsys)
    (folder / "00004-of-00006" / "slice.json").write_text("{")
    lines = refused(argv("--num_shards", 6, "--merge"), capsys)
    assert [line.split(" (")[0] for line in lines] == [
        f"slice 1: train/{arrow.name} has {arrow.stat().st_size} bytes instead of {arrow.stat().st_size + 8}",
        "slice 2: train/data-00000.arrow is missing",
        "slice 3: made with --seed 7 instead of 42",
        "slice 4: its slice.json cannot be read",
        "slice 5 is missing: run the same command with --shard 5",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [folder.name]


def test_merge_notices_other_files_and_another_tokenizer(argv, byt5, capsys, tmp_path):
    for shard in (0, 1):
        make(argv("--num_shards", 3, "--shard", shard), capsys)
    write_json_lines(tmp_path / "part-9.jsonl", made_up(20))
    other = tmp_path / "other" / "byt5"
    ByT5Tokenizer(extra_ids=7).save_pretrained(other)
    make([str(other) if word == str(byt5) else word for word in argv("--num_shards", 3, "--shard", 2)], capsys)
    assert refused(argv("--num_shards", 3, "--merge"), capsys) == [
        "slice 2: made with another tokenizer than slice 0; make it again",
        "slice 2: made with another list of source files than slice 0; make it again",
    ]


def test_bad_flags(argv, capsys, monkeypatch, tmp_path):
    for extra, message in {
        ("--shard", 0): "--shard needs --num_shards N",
        ("--merge",): "--merge needs --num_shards N",
        ("--num_shards", 3): "--num_shards 3 needs --shard I (or SLURM_ARRAY_TASK_ID), or --merge",
        ("--num_shards", 3, "--shard", 3): "--shard 3 must be below --num_shards 3",
        ("--num_shards", 3, "--shard", 1, "--merge"): "--shard 1 and --merge contradict each other: give one of them",
        ("--num_shards", 8, "--shard", 7): "--num_shards 8: the train split is divided by files, and has only 7 (with "
        "--take it is divided by documents)",
    }.items():
        assert refused(argv(*extra), capsys) == [message]
    assert "--shard must be an integer of at least 0" in refused(argv("--num_shards", 3, "--shard", -1), capsys)[0]
    lines = refused([*argv("--num_shards", 3, "--shard", 1)[:2], "--save_dir", str(tmp_path), "--num_shards", "3",
                     "--shard", "1", "--train_tokenizer", "300"], capsys)  # fmt: skip
    assert lines[0].startswith("--train_tokenizer 300 needs all the text, not slices of it")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert refused(argv("--num_shards", 3), capsys) == ["--shard 5 must be below --num_shards 3"]
    whole = make(argv(), capsys)  # an array task of something else
    assert refused(argv("--num_shards", 3, "--shard", 1), capsys) == [
        f"{whole} exists already (--overwrite replaces it)"
    ]
    assert not (tmp_path / "out" / f"{whole.name}.slices").exists()


def test_a_slice_made_with_other_flags_is_not_taken_for_this_one(argv, capsys, tmp_path):
    make(argv("--num_shards", 3, "--shard", 1), capsys)
    (line,) = refused(argv("--num_shards", 3, "--shard", 1, "--seed", 5), capsys)
    assert line.endswith("00001-of-00003: made with --seed 42 instead of 5 (--overwrite replaces it)")
    make(argv("--num_shards", 3, "--shard", 1, "--seed", 5, "--overwrite"), capsys)
    make(argv("--num_shards", 3, "--shard", 1, "--seed", 5), capsys)


def test_validation_smaller_than_a_block_is_refused_before_any_work(argv, capsys, tmp_path):
    (line,) = refused(argv("--num_shards", 2, "--validation_fraction", 1e-9, "--shard", 0), capsys)
    assert line.startswith("--validation_fraction 1e-09: of ") and "less than one block of 16 tokens" in line
    assert not (tmp_path / "out").exists()


def test_validation_that_turns_out_smaller_than_a_block_is_refused_before_anything_is_linked(argv, capsys, monkeypatch):
    flags = ("--num_shards", 2, "--validation_fraction", 0.0006)  # by chance of none of the documents
    for shard in range(2):
        make(argv(*flags, "--shard", shard), capsys)
    monkeypatch.setattr(block_writer.BlockWriter, "adopt", None)
    (line,) = refused(argv(*flags, "--merge"), capsys)
    assert "the validation split's 0 documents have only 0 tokens, not one block" in line
