"""Runs that stream documents: stopping in the middle of a shard, several ranks, shards that go away, bad input."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import helpers
import pytest
from conftest import write_model
from helpers import GALORE, RESUME, stop_after
from streaming_helpers import VOCABULARY, made_up, write_lines, write_shards

from peft_pretraining.data import shards as shards_module
from peft_pretraining.data.tokenizer import train_tokenizer

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LENGTH = 32
EXACT = 1e-5


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Model, tokenizer and two folders of the same documents; 20 updates of 8 read 1.4 epochs."""
    folder = tmp_path_factory.mktemp("parts")
    train_tokenizer(made_up(300), VOCABULARY, 1).save_pretrained(folder / "tokenizer")
    write_model(folder / "m.json", vocab_size=VOCABULARY)
    write_shards(folder / "gz")
    write_shards(folder / "plain", ".jsonl")
    return folder


@pytest.fixture
def streamed(command, parts, monkeypatch):
    """A function that gives the command line of a small run with windows of 16 documents."""
    monkeypatch.setattr("peft_pretraining.data.streaming.WINDOW", 16)
    settings = {"dataset_path": None, "base_dir": parts / "gz", "tokenizer": parts / "tokenizer"}
    return lambda **changes: command(
        **{**settings, "model_config": parts / "m.json", "max_length": LENGTH, **GALORE, **changes}
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return helpers.Undisturbed(tmp_path_factory)


@pytest.mark.parametrize("base_dir", ["gz", "plain"])
@pytest.mark.parametrize("updates, workers", [(3, 0), (7, 1), (14, 0), (17, 1)])  # an epoch ends in the 15th
def test_stop_in_the_middle_of_a_shard_and_resume_changes_no_bit(
    streamed, undisturbed, tmp_path, parts, base_dir, updates, workers
):
    flags = streamed(base_dir=parts / base_dir, workers=workers)
    stop_after(updates, flags)
    place = helpers.counters(tmp_path / "run" / f"model_{updates}")["data_state"]
    assert place["offset"] > 0 and updates * 8 - 16 < place["position"] <= updates * 8
    assert helpers.run([*flags, *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(streamed, base_dir=parts / base_dir))


def test_plain_and_compressed_shards_train_alike(streamed, undisturbed, parts):
    runs = [undisturbed(streamed, base_dir=parts / name) for name in ("gz", "plain")]
    assert helpers.updates(runs[0]) == helpers.updates(runs[1])
    assert helpers.evaluations(runs[0]) == helpers.evaluations(runs[1])


def test_tokens_are_counted_without_padding(streamed, undisturbed, parts):
    rows = [row for row in helpers.records(undisturbed(streamed, base_dir=parts / "gz")) if "loss" in row]
    read = [b["tokens_seen"] - a["tokens_seen"] for a, b in itertools.pairwise(rows)]
    assert all(8 * 4 < tokens < 8 * LENGTH for tokens in read)
    assert rows[0]["throughput_tokens"] * rows[0]["step_time"] == pytest.approx(rows[0]["tokens_seen"])


def test_a_new_epoch_is_announced(streamed, capsys):
    assert helpers.run(streamed()) == 0
    assert "the training data has been read 1 time(s); epoch 1 begins at update 15" in capsys.readouterr().err


def test_a_warm_start_goes_on_in_the_data(streamed, undisturbed, tmp_path, parts):
    saved = undisturbed(streamed, base_dir=parts / "gz") / "model_10"
    assert helpers.run(streamed(warmed_up_model=saved, num_training_steps=12, cycle_length=2, warmup_steps=0)) == 0
    counters = helpers.counters(tmp_path / "run" / "model_12")
    assert counters["data_position"] == 96 and counters["data_state"]["position"] == 96


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, parts):
    """Runs by one process and by two, all of the second kind in one launch."""
    folder = tmp_path_factory.mktemp("distributed")

    def command(name, **changes):
        settings = {
            **{"model_config": parts / "m.json", "base_dir": parts / "gz", "tokenizer": parts / "tokenizer"},
            **{"max_length": LENGTH, "save_dir": folder / name, "workers": 1, **GALORE, "batch_size": 4},
            **{"total_batch_size": 8, "lr": 3e-3, "num_training_steps": 20, "warmup_steps": 2, "eval_tokens": 300},
            **{"eval_every": 10, "save_every": 10, "dtype": "float32", **changes},
        }
        return [str(part) for flag, value in settings.items() for part in (f"--{flag}", value)]

    assert helpers.run(command("one")) == 0
    stop_after(7, command("from one to two"))
    cases = [
        {"argv": command("two")},
        {"argv": command("accumulated", batch_size=2)},
        {"argv": [*command("from one to two"), *RESUME]},
        {"argv": command("from two to one"), "signal": [1, 8]},
        {"argv": command("fsdp", distributed_type="fsdp")},
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    launched = subprocess.run(
        [*TORCHRUN, helpers.__file__, str(folder / "cases.json")],
        **{"env": helpers.child_environment(), "cwd": helpers.PROJECT, "capture_output": True, "text": True},
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr
    assert helpers.counters(folder / "from two to one" / "model_9")["world_size"] == 2
    assert helpers.run([*command("from two to one"), *RESUME]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "accumulated", "from one to two", "from two to one", "fsdp"])
def test_two_processes_see_the_documents_that_one_sees(pairs, name):
    for read in (helpers.updates, helpers.evaluations):
        rows, expected = read(pairs / name), read(pairs / "one")
        assert [row[0] for row in rows] == [row[0] for row in expected]
        for row, target in zip(rows, expected, strict=True):
            assert row[1:] == pytest.approx(target[1:], abs=EXACT), f"update {row[0]}"
    seen = [[row["tokens_seen"] for row in helpers.records(pairs / run)] for run in (name, "one")]
    tokens = [[row.get("final_eval_tokens") for row in helpers.records(pairs / run)] for run in (name, "one")]
    assert seen[0] == seen[1] and tokens[0] == tokens[1]
    ended = [helpers.counters(pairs / run / "model_20") for run in (name, "one")]
    assert ended[0]["data_state"] == ended[1]["data_state"]


def own_copy(parts, tmp_path):
    return shutil.copytree(parts / "gz", tmp_path / "shards")


def test_a_shard_that_goes_away_ends_the_run_in_one_line_and_nothing_saved_is_lost(
    streamed, undisturbed, tmp_path, parts, monkeypatch, capsys
):
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", (0.01, 0.01))
    shards = own_copy(parts, tmp_path)
    flags = streamed(base_dir=shards, save_every=1)
    with helpers.before_update(2, lambda: [file.rename(file.with_suffix(".gone")) for file in shards.glob("*train*")]):
        assert helpers.run(flags) == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if " ERROR " in line]
    assert len(errors) == 1 and "cannot be read, after 2 more attempts" in errors[0], errors
    assert not any("Traceback" in line for line in lines)
    for file in shards.glob("*.gone"):
        file.rename(file.with_suffix(".gz"))
    assert helpers.run([*flags, *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(streamed, base_dir=parts / "gz"))


def test_a_shard_that_is_cut_short_ends_the_run_in_one_line(streamed, tmp_path, parts, capsys):
    shards = own_copy(parts, tmp_path)
    for path in sorted(shards.glob("*train*"))[1:]:  # the first is looked into before the run begins
        path.write_bytes(path.read_bytes()[:-9])
    assert helpers.run(streamed(base_dir=shards, workers=1)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if " ERROR " in line]
    assert len(errors) == 1 and "c4-train" in errors[0] and "damaged or cut short near line" in errors[0], errors


def test_workers_do_not_keep_a_process_that_fails(streamed, tmp_path, parts):
    """They leave signals to it, so that it must end them whatever ends it."""
    shards = own_copy(parts, tmp_path)
    for path in sorted(shards.glob("*train*"))[1:]:
        path.write_bytes(path.read_bytes()[:-9])
    ended = subprocess.run(
        [sys.executable, str(helpers.PROJECT / "torchrun_main.py"), *streamed(base_dir=shards, workers=1)],
        **{"env": helpers.child_environment(), "cwd": tmp_path, "capture_output": True, "text": True},
        timeout=60,
    )
    assert ended.returncode == 1 and "damaged or cut short" in ended.stderr, ended.stderr


def test_other_shards_are_another_run(streamed, tmp_path, parts, capsys):
    shards = own_copy(parts, tmp_path)
    flags = streamed(base_dir=shards, num_training_steps=4, warmup_steps=0)
    stop_after(2, flags)
    moved = shutil.move(shards, tmp_path / "moved")
    stop_after(3, [*streamed(base_dir=moved, num_training_steps=4, warmup_steps=0), *RESUME])  # the same shards
    write_lines(tmp_path / "moved" / "c4-train.9.json", ['{"text": "more"}'])
    capsys.readouterr()
    assert helpers.run([*streamed(base_dir=moved, num_training_steps=4, warmup_steps=0), *RESUME]) == 2
    assert "it was begun with other data" in capsys.readouterr().err


# Bad input.


@pytest.fixture
def refused(capsys, tmp_path):
    def run(argv):
        capsys.readouterr()
        assert helpers.run(argv) == 2
        assert not (tmp_path / "run").exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return [line.removeprefix("error: ") for line in lines]

    return run


def test_a_base_dir_that_is_no_folder(streamed, refused):
    assert refused(streamed(base_dir="nowhere")) == ["--base_dir nowhere: no such folder"]


def test_a_base_dir_without_shards(streamed, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    problems = refused(streamed(base_dir=tmp_path / "empty", lr=0))
    assert [problem.split(": files")[0] for problem in problems[1:]] == [
        f"--base_dir {tmp_path / 'empty'}: no {split} shards" for split in ("train", "validation")
    ]
    assert problems[0].startswith("--lr")  # all together


@pytest.mark.parametrize(
    "content, part",
    [
        ([], "holds no documents"),
        (["[", '{"text": "a"}', "]"], "line 1 is not valid JSON"),
        (['{"content": "a"}'], "line 1 has no text in a field 'text'"),
    ],
)
def test_a_first_document_that_is_none(streamed, refused, tmp_path, content, part):
    write_lines(tmp_path / "c4" / "c4-train.json", ['{"text": "fine"}'])
    path = write_lines(tmp_path / "c4" / "c4-validation.json.gz", content)
    assert [problem.split(" (")[0] for problem in refused(streamed(base_dir=path.parent))] == [f"{path}: {part}"]


def test_a_tokenizer_that_the_model_is_too_small_for(streamed, refused, tmp_path):
    model = write_model(tmp_path / "small.json", vocab_size=VOCABULARY - 1)
    (problem,) = refused(streamed(model_config=model))
    assert problem.endswith(f"token id {VOCABULARY - 1} is beyond the model's vocabulary of {VOCABULARY - 1}")


def test_a_tokenizer_that_is_not_there(streamed, refused):
    (problem,) = refused(streamed(tokenizer=None))  # t5-base, from the hub
    assert problem.startswith("--tokenizer t5-base: no folder with a tokenizer, and not loadable from the hub")


def test_padding_cannot_be_turned_off(streamed, refused):
    (problem,) = refused(streamed(padding_data=False))
    assert problem.startswith("--padding_data False")


def test_documents_are_cut_at_256_tokens_unless_told_otherwise(streamed, refused, tmp_path):
    model = write_model(tmp_path / "small.json", max_position_embeddings=128, vocab_size=VOCABULARY)
    assert refused(streamed(model_config=model, max_length=None)) == [
        "--max_length 256 is beyond the model's 128 positions "
        "(max_position_embeddings: they have no weights, so that a new model may have more)"
    ]


def test_json_shards_in_dataset_path(streamed, undisturbed, tmp_path, parts):
    """As an older code base has them: folders `train` and `validation`; and the folder may hold the tokenizer."""
    folder = shutil.copytree(parts / "tokenizer", tmp_path / "data")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        for file in sorted((parts / "gz").glob(f"*{split}*")):
            shutil.copy(file, folder / split)
    flags = streamed(base_dir=None, dataset_path=folder, from_json_data=True, tokenizer=None, padding_data=True)
    assert helpers.run(flags) == 0
    assert helpers.updates(tmp_path / "run") == helpers.updates(undisturbed(streamed, base_dir=parts / "gz"))
    assert (tmp_path / "run" / "model_20" / "tokenizer.json").is_file()
