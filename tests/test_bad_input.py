"""Bad input: exit code 2, one clear line per problem, all together, before anything is written."""

import importlib.machinery
import importlib.util
import json
import shutil
from collections import namedtuple

import pytest
from conftest import BLOCK, write_blocks, write_model

import torchrun_main
from peft_pretraining.checkpoint import run_dir
from peft_pretraining.runtime import launcher


@pytest.fixture
def refused(tmp_path, capsys):
    """A function: run the command line, expect exit code 2 and nothing written, and give the problems."""

    def run(argv: list[str]) -> list[str]:
        before = tree(tmp_path)
        capsys.readouterr()
        assert torchrun_main.main(argv) == 2
        assert tree(tmp_path) == before
        output = capsys.readouterr()
        assert output.out == ""
        lines = [line for line in output.err.splitlines() if not line.startswith("20")]  # log lines begin with a date
        assert lines and all(line.startswith("error: ") for line in lines), output.err
        return [line.removeprefix("error: ") for line in lines]

    return run


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def only(problems, *parts):
    """The one problem there is, which names all of `parts`."""
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in parts), problems[0]


def test_missing_model_json(command, refused):
    only(refused(command(model_config="nowhere.json")), "--model_config nowhere.json", "No such file")


def test_no_model_at_all(command, refused):
    only(refused(command(model_config=None)), "--model_config is required")


def test_malformed_model_json(command, refused, tmp_path):
    (tmp_path / "m.json").write_text('{"hidden_size": 32,')
    only(refused(command(model_config=tmp_path / "m.json")), "not valid JSON")


def test_unknown_key_in_model_json(command, refused, tmp_path):
    path = write_model(tmp_path / "m.json", hiden_size=32)
    only(refused(command(model_config=path)), "unknown key 'hiden_size'")


def test_heads_that_do_not_divide_the_hidden_size(command, refused, tmp_path):
    path = write_model(tmp_path / "m.json", num_attention_heads=5)
    only(refused(command(model_config=path)), "num_attention_heads 5 must divide hidden_size 32")


def test_missing_dataset_folder(command, refused):
    only(refused(command(dataset_path="nowhere")), "--dataset_path nowhere", "no such folder")


def test_no_dataset(command, refused):
    """C4 would be streamed, but the tests have no network."""
    only(refused(command(dataset_path=None)), "no --dataset_path and no --base_dir", "hub", "cannot be reached")


@pytest.mark.parametrize("missing", ["args.json", "dataset_dict.json"])
def test_a_folder_that_is_not_pretokenised(command, refused, data_dir, tmp_path, missing):
    shutil.copytree(data_dir, tmp_path / "data")
    (tmp_path / "data" / missing).unlink()
    only(refused(command(dataset_path=tmp_path / "data")), "was not written by pretokenize.py", missing)


def test_data_files_that_are_damaged(command, refused, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    for file in (tmp_path / "data" / "train").glob("*.arrow"):
        file.write_bytes(b"")
    only(refused(command(dataset_path=tmp_path / "data")), "--dataset_path")


@pytest.mark.parametrize("max_length", [BLOCK - 1, BLOCK * 2])
def test_blocks_that_cannot_be_cut(command, refused, max_length):
    only(refused(command(max_length=max_length)), f"--max_length {max_length}", f"{BLOCK} tokens cannot be cut")


def test_more_tokens_than_positions(command, refused, tmp_path):
    path = write_model(tmp_path / "m.json", max_position_embeddings=32)
    only(refused(command(model_config=path)), "beyond the model's 32 positions")


def test_token_ids_beyond_the_vocabulary(command, refused, tmp_path):
    path = write_model(tmp_path / "m.json", vocab_size=100)
    only(refused(command(model_config=path)), "token id 127 is beyond the model's vocabulary of 100")


def test_token_ids_beyond_the_vocabulary_in_an_older_data_folder(command, refused, tmp_path, tmp_path_factory):
    """Without the largest id in args.json the tokens themselves are looked through."""
    folder = write_blocks(tmp_path_factory.mktemp("older") / "data")
    (folder / "args.json").write_text(json.dumps({"sequence_length": BLOCK}))
    path = write_model(tmp_path / "m.json", vocab_size=100)
    only(refused(command(model_config=path, dataset_path=folder)), "token id 127 is beyond")


def test_batch_sizes_that_do_not_divide(command, refused):
    problems = refused(command(batch_size=3, total_batch_size=8))
    only(problems, "--total_batch_size 8", "--batch_size 3", "world size 1")


@pytest.mark.parametrize(
    "flag, value, part",
    [
        ("method", "galor", "--method 'galor' is unknown"),
        ("method", "relorra", "is unknown; there is full_rank"),
        ("optimizer", "adamax", "--optimizer 'adamax' is unknown"),
        ("optimizer", "golore_lion", "--optimizer 'golore_lion' is unknown; there is golore_adamw"),
        ("proj_type", "sideways", "must be one of std"),
        ("scheduler", "step", "must be one of linear, cosine"),
        ("lr", "0", "must be greater than 0"),
        ("lr", "-1e-3", "must be greater than 0"),
        ("lr", "fast", "must be a number"),
        ("lr", "nan", "must be finite"),
        ("batch_size", "0", "must be a positive integer"),
        ("num_training_steps", "-5", "must be a positive integer"),
        ("num_training_steps", "2.5", "must be an integer"),
        ("eval_every", "0", "must be a positive integer"),
        ("warmup_steps", "-1", "at least 0"),
        ("warmup_steps", "21", "must not exceed --num_training_steps 20"),
        ("min_lr_ratio", "1", "at least 0 and below 1"),
        ("autoresume", "yes", "must be True or False"),
        ("cycle_length", "7", "must be a multiple of --cycle_length 7"),
        ("dtype", "float16", "must be one of"),
    ],
)
def test_a_value_that_makes_no_sense(command, refused, flag, value, part):
    problems = refused(command(**{flag: value}))
    assert any(f"--{flag}" in problem and part in problem for problem in problems), problems


def test_unknown_flag_and_abbreviation(command, refused):
    problems = refused([*command(), "--learning_rat", "1", "--num_training", "3"])
    assert len(problems) == 2 and "unknown flag --learning_rat" in problems[0], problems
    assert "unknown flag --num_training (did you mean" in problems[1]


def test_unknown_yaml_key(command, refused, tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 4e-4\nwarmup: 3\n")
    only(refused([*command(lr=None), "--training_config", str(tmp_path / "c.yaml")]), "unknown key 'warmup'")


def test_save_dir_that_holds_another_run(command, refused, tmp_path):
    assert torchrun_main.main(command(num_training_steps=2)) == 0
    problems = refused(command(num_training_steps=2, autoresume=True, method="galore", rank=4))
    assert all("holds another run" in problem for problem in problems)
    assert any("method 'full_rank' instead of 'galore'" in problem for problem in problems)


def test_save_dir_that_is_not_empty(command, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    only(refused(command()), "is not empty", "--autoresume True")


def test_autoresume_without_a_folder(command, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    only(refused(command(save_dir=None, autoresume=True)), "--autoresume True needs --save_dir")


def test_no_space(command, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    only(refused(command()), "no space")


def test_no_permission_to_write(command, refused):
    """Permission bits do not bind root; the kernel's own file system does."""
    only(refused(command(save_dir="/proc/sys/run")), "no permission to write")


def test_save_dir_below_a_file(command, refused, tmp_path):
    (tmp_path / "file").write_text("")
    only(refused(command(save_dir=tmp_path / "file" / "run")), "no permission to write", "Not a directory")


def test_flash_attention_without_the_package(command, refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    only(refused(command(attn_implementation="flash_attention_2")), "flash-attn, which is not installed")


def test_flash_attention_on_the_cpu(command, refused, monkeypatch):
    found = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr("peft_pretraining.config.validate.importlib.util.find_spec", lambda name: found)
    only(refused(command(attn_implementation="flash_attention_2")), "needs CUDA")


def test_warm_start_from_nothing_and_from_another_shape(command, refused, tmp_path):
    only(refused(command(warmed_up_model=tmp_path / "none")), "--warmed_up_model", "no such folder")
    (tmp_path / "other").mkdir()
    write_model(tmp_path / "other" / "config.json", hidden_size=64)
    only(refused(command(warmed_up_model=tmp_path / "other")), "its hidden_size 64 differs from 32")


def test_resume_from_something_else(command, refused, tmp_path):
    (tmp_path / "folder").mkdir()
    only(refused(command(resume_from=tmp_path / "folder")), "is not a checkpoint of a run")


def test_unreadable_settings_of_the_run(command, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_dir.CONFIG_FILE).write_text("settings: [")
    only(refused(command(autoresume=True)), "config.yaml cannot be read")


def test_many_problems_are_reported_together(refused, tmp_path):
    problems = refused(
        [
            "--model_config",
            "none.json",
            "--lr",
            "0",
            "--optimzer",
            "adam",
            "--scheduler",
            "step",
            "--dataset_path",
            "no",
        ]
    )
    for part in ("none.json", "--lr", "--optimzer", "--scheduler", "--dataset_path no", "--batch_size is required"):
        assert any(part in problem for problem in problems), part


def test_one_rank_per_machine_speaks(command, monkeypatch, capsys):
    """The others wait for torchrun to end them, and speak if it does not: then only they see the problem."""
    waited = []
    monkeypatch.setattr(launcher.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun_main.main(command(lr=0)) == 2
    assert capsys.readouterr().err.count("error: ") == 1 and waited[0] >= 10
