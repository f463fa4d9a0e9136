"""Splitting and converting the command line and YAML files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from flag_helpers import FLAGS, parse

from peft_pretraining import flags
from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        *[
            ("--autoresume", True),
            ("--autoresume True", True),
            ("--autoresume true", True),
            ("--autoresume=True", True),
        ],
        *[("--autoresume False", False), ("--autoresume false", False), ("--autoresume=false", False)],
        *[("--autoresume --rank 3", True), ("--autoresume True --autoresume False", False)],
    ],
)
def test_boolean(words, value):
    values, problems = parse(*words.split())
    assert (values["autoresume"], problems) == (value, [])


@pytest.mark.parametrize("bad", ["yes", "1", "0", "TRUE", "on", "None"])
def test_bad_boolean(bad):
    assert parse("--autoresume", bad) == (
        {},
        [f"--autoresume must be True or False (or nothing, for True), got '{bad}'"],
    )


def test_a_flag_that_is_not_given_is_absent():
    assert parse() == ({}, [])


@pytest.mark.parametrize("spelling", ["rank", "lora_r", "lora_rank"])
def test_aliases_set_the_same_value_and_are_remembered(spelling):
    problems = []
    given = flags.parse_command_line(FLAGS, [f"--{spelling}", "8"], prog="", description="", problems=problems)
    assert given == {"rank": flags.ParsedFlag(8, spelling, "command line")}
    assert parse(f"--{spelling}", "0")[1] == [f"--{spelling} must be a positive integer, got '0'"]


def test_aliases_of_torchrun_main():
    spellings = {flag.name: flag.spellings for flag in cli.all_flags()}
    assert spellings["rank"] == ("rank", "lora_r", "lora_rank")
    assert spellings["scale"] == ("scale", "galore_scale")
    assert spellings["clip_grad_norm"] == ("clip_grad_norm", "grad_clipping")
    assert spellings["workers"] == ("workers", "num_workers")
    assert spellings["resume_from"] == ("resume_from", "continue_from")


def test_no_two_flags_share_a_spelling():
    spellings = [spelling for flag in cli.all_flags() for spelling in flag.spellings]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("short", ["--autores", "--lora_ran", "--tok", "--save"])
def test_abbreviations_are_unknown(short):
    values, problems = parse(short, "3")
    assert values == {}
    assert len(problems) == 1
    assert problems[0].startswith(f"unknown flag {short} (did you mean ")


def test_the_last_of_repeated_flags_wins():
    assert parse("--rank", "4", "--lr", "1", "--lora_r", "8") == ({"rank": 8, "lr": 1.0}, [])
    assert parse("--rank", "x", "--rank", "8") == ({"rank": 8}, [])


@pytest.mark.parametrize(
    ("words", "replaced"),
    [
        ("--rank 4 --lora_r 8", "--rank 4"),
        ("--lora_r 4 --rank=8", "--lora_r 4"),
        ("--rank 8 --lora_r 8", None),
        ("--rank 4 --rank 8", None),
    ],
)
def test_a_value_that_is_replaced_under_another_name_is_remembered(words, replaced):
    given = flags.parse_command_line(FLAGS, words.split(), prog="", description="", problems=[])
    assert (given["rank"].value, given["rank"].replaced) == (8, replaced)


def test_a_value_that_is_replaced_under_another_name_is_named(command):
    launch = cli.load([*command(workers=0), "--num_workers", "1"])
    assert launch.config.data.workers == 1
    warning = "--workers 0 has no effect: --num_workers, which is the same setting, was given after it"
    assert launch.warnings == (warning,)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("-3", -3.0), ("-0.5", -0.5), ("-.5", -0.5), ("-4e-4", -4e-4), ("-1E+3", -1000.0), ("-2.5e-1", -0.25)],
        *[("4e-4", 4e-4), ("1e6", 1e6), (".5", 0.5), ("0.", 0.0), ("+2", 2.0)],
    ],
)
def test_numbers(text, value):
    assert parse("--lr", text) == parse(f"--lr={text}") == ({"lr": value}, [])


def test_a_negative_number_belongs_to_the_flag_before_it_only():
    assert parse("--lr=1", "-4e-4") == ({"lr": 1.0}, ["unexpected argument '-4e-4'"])
    assert parse("--nonsense", "-4e-4") == ({}, ["unknown flag --nonsense"])
    assert parse("--rank", "-4e-4") == ({}, ["--rank must be an integer, got '-4e-4'"])
    assert parse("--autoresume", "-1")[1] == ["--autoresume must be True or False (or nothing, for True), got '-1'"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[("x", "must be a number"), ("", "must be a number"), ("1,5", "must be a number"), ("1e", "must be a number")],
        *[
            ("nan", "must be finite"),
            ("inf", "must be finite"),
            ("-inf", "must be finite"),
            ("1e999", "must be finite"),
        ],
    ],
)
def test_bad_numbers(text, message):
    assert parse(f"--lr={text}") == ({}, [f"--lr {message}, got {text!r}"])


@pytest.mark.parametrize("text", ["1.0", "1e3", "x", ""])
def test_integers_are_not_rounded(text):
    assert parse(f"--seed={text}") == ({}, [f"--seed must be an integer, got {text!r}"])


@pytest.mark.parametrize("words", ["--lr", "--lr --autoresume", "--autoresume --lr --lr"])
def test_missing_value(words):
    assert parse(*words.split())[1] == ["--lr needs a value"]


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        ("--lrr 3", ["unknown flag --lrr (did you mean lr?)"]),
        ("--save_dri=x", ["unknown flag --save_dri (did you mean save_dir?)"]),
        ("--Rank 3", ["unknown flag --Rank (did you mean rank?)"]),
        ("--zzzzzz 3 --lr 1", ["unknown flag --zzzzzz"]),
        ("stray --lr 1", ["unexpected argument 'stray'"]),
        ("--save_dir a b", ["unexpected argument 'b'"]),
        ("--xx=1 stray -l", ["unknown flag --xx", "unexpected argument 'stray'", "unexpected argument '-l'"]),
    ],
)
def test_what_is_unknown(words, problems):
    assert parse(*words.split())[1] == problems


def test_all_problems_are_collected():
    words = "--lrr 1 --rank 0 --lr x --autoresume maybe --tokens many --scheduler sine --seed"
    values, problems = parse(*words.split(), "--save_dir", "kept")
    assert values == {"save_dir": "kept"}
    assert problems == [
        "unknown flag --lrr (did you mean lr?)",
        "--rank must be a positive integer, got '0'",
        "--lr must be a number, got 'x'",
        "--autoresume must be True or False (or nothing, for True), got 'maybe'",
        "--tokens must be a number of tokens such as 100M or 2B, got 'many'",
        "--scheduler must be one of linear, cosine, got 'sine'",
        "--seed needs a value",
    ]


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.load(["--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for flag in cli.all_flags():
        assert flag.help
        assert all(f"--{spelling} " in printed for spelling in flag.spellings), flag.name
        # argparse breaks lines at hyphens, too.
        assert "".join(flag.help.split()) in "".join(printed.split()), flag.name


# Problems as a whole


def test_problems_are_printed_one_per_line(capsys):
    assert flags.exit_with_problems(ConfigError(["first", "second"])) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: first\nerror: second\n")


def test_problems_survive_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ConfigError(iter(["first", "second"]))))
    assert error.problems == ["first", "second"]
    assert str(error) == "first\nsecond"


def test_bad_input_is_found_before_anything_heavy_is_imported(tmp_path, model_json, data_dir):
    (tmp_path / "settings.yaml").write_text("lrr: 1\n")
    argv = ["--training_config", tmp_path / "settings.yaml", "--model_config", model_json, "--dataset_path", data_dir]
    argv += ["--save_dir", tmp_path / "run", "--batch_size", 4, "--method", "galore", "--attn_implementation", "sdpa"]
    script = """
import json, sys
import torchrun_main
from peft_pretraining.config import cli
try:
    cli.load(json.loads(sys.argv[1]))
except cli.ConfigError as error:
    heavy = {"torch", "transformers", "datasets", "numpy", "pyarrow", "wandb", "tokenizers", "safetensors"}
    print(json.dumps([error.problems, sorted(heavy & set(sys.modules))]))
"""
    arguments = json.dumps([str(part) for part in argv])
    done = subprocess.run(
        [sys.executable, "-c", script, arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    (problem,), imported = json.loads(done.stdout)
    assert "unknown key 'lrr'" in problem
    assert imported == []
