"""Splitting and converting the command line and YAML files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from peft_pretraining import cli, flags
from peft_pretraining.flags import ConfigError, Flag

PROJECT = Path(__file__).resolve().parents[1]

FLAGS = [
    Flag("training_config", flags.string, "a file"),
    Flag("rank", flags.positive_int, "a number with aliases, in 100% of cases", ("lora_r", "lora_rank")),
    Flag("lr", flags.number, "a number"),
    Flag("seed", flags.integer, "an integer"),
    Flag("autoresume", flags.boolean, "a switch"),
    Flag("tokens", flags.token_count, "tokens"),
    Flag("tags", flags.comma_separated, "a list"),
    Flag("save_dir", flags.string, "a path"),
    Flag("scheduler", flags.choice("linear", "cosine"), "one of two"),
]


def parse(*argv):
    """Values by name, the spellings used, and the problems."""
    problems = []
    given = flags.parse_command_line(FLAGS, argv, prog="test", description="", problems=problems)
    return {name: item.value for name, item in given.items()}, problems


def parse_file(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    problems = []
    given = flags.parse_yaml(FLAGS, str(path), problems)
    return {name: item.value for name, item in given.items()}, [each.replace(str(path), "FILE") for each in problems]


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
    assert given == {"rank": flags.Given(8, spelling, "command line")}
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


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (flags.positive_int, {"1": 1, "20": 20}, ["0", "-1", "1.5"]),
        (flags.non_negative_int, {"0": 0, "7": 7}, ["-1", "0.5"]),
        (flags.positive_float, {"1e-9": 1e-9, "2": 2.0}, ["0", "-1e-3", "0.0"]),
        (flags.non_negative_float, {"0": 0.0, "0.": 0.0, "3": 3.0}, ["-1e-3"]),
        (flags.fraction_below_one, {"0": 0.0, "0.999": 0.999}, ["1", "-0.1", "1.5"]),
        (flags.choice("a", "b"), {"a": "a", "b": "b"}, ["c", "A", ""]),
        (flags.string, {"a b": "a b", "0": "0"}, [""]),
    ],
)
def test_ranges(convert, good, bad):
    assert {text: convert(text) for text in good} == good
    for text in bad:
        with pytest.raises(ValueError, match="must "):
            convert(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1000000", 10**6), ("1e6", 10**6), ("20K", 20_000), ("100M", 10**8), ("100m", 10**8), ("2B", 2 * 10**9)],
        *[("1.5b", 1_500_000_000), ("0.1M", 100_000), ("1.1B", 1_100_000_000)],
    ],
)
def test_token_counts(text, value):
    assert parse("--tokens", text) == ({"tokens": value}, [])


@pytest.mark.parametrize("text", ["M", "10G", "1MB", "x", "", "nan", "inf", "1e400M"])
def test_bad_token_counts(text):
    assert parse(f"--tokens={text}")[1] == [
        f"--tokens must be a number of tokens such as 100M or 2B, got {text!r}",
    ]


@pytest.mark.parametrize("text", ["0", "-5M", "0.0000001K"])
def test_token_counts_are_positive(text):
    assert parse("--tokens", text)[1] == [f"--tokens must be a positive number of tokens, got {text!r}"]


def test_comma_separated():
    assert parse("--tags", "a, b,,c ")[0] == {"tags": ("a", "b", "c")}
    assert parse("--tags=")[0] == {"tags": ()}


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


# YAML files


def test_yaml_values_go_through_the_flags_type(tmp_path):
    text = """
        lr: 4e-4            # a string to YAML
        lora_r: 16
        seed: -3
        autoresume: yes     # a bool to YAML
        tokens: 1.5B
        tags: [a, b]
        save_dir: 2024
        scheduler: "linear"
    """
    values, problems = parse_file(tmp_path, text)
    assert problems == []
    assert values == {
        **{"lr": 4e-4, "rank": 16, "seed": -3, "autoresume": True, "tokens": 1_500_000_000},
        **{"tags": ("a", "b"), "save_dir": "2024", "scheduler": "linear"},
    }
    assert type(values["lr"]) is float


@pytest.mark.parametrize("text", ["true", "True", "on", "'true'"])
def test_yaml_true(tmp_path, text):
    assert parse_file(tmp_path, f"autoresume: {text}") == ({"autoresume": True}, [])


@pytest.mark.parametrize("text", ["false", "False", "off", "no", "'False'"])
def test_yaml_false(tmp_path, text):
    assert parse_file(tmp_path, f"autoresume: {text}") == ({"autoresume": False}, [])


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_yaml_null_leaves_the_default(tmp_path, text):
    assert parse_file(tmp_path, f"lr: {text}\nrank: 2") == ({"rank": 2}, [])


def test_yaml_list_of_another_style(tmp_path):
    assert parse_file(tmp_path, "tags:\n- a\n- 1\n") == ({"tags": ("a", "1")}, [])
    assert parse_file(tmp_path, "tags: a,b") == ({"tags": ("a", "b")}, [])
    assert parse_file(tmp_path, "tags: []") == ({"tags": ()}, [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lrr: 1", "--training_config FILE: unknown key 'lrr' (did you mean lr?)"),
        ("3: 1", "--training_config FILE: unknown key 3"),
        ("training_config: other.yaml", "--training_config FILE: unknown key 'training_config'"),
        ("lr: {base: 1}", "--training_config FILE: lr must be a single value, got a mapping"),
        ("lr: [1, 2]", "--lr must be a number, got '1,2' (in FILE)"),
        ("rank: 1.5", "--rank must be an integer, got '1.5' (in FILE)"),
        ("lora_r: true", "--lora_r must be an integer, got 'True' (in FILE)"),
        ("autoresume: 1", "--autoresume must be True or False (or nothing, for True), got '1' (in FILE)"),
        ("- lr", "--training_config FILE: must be a mapping of flag names to values"),
        ("just text", "--training_config FILE: must be a mapping of flag names to values"),
        ("", "--training_config FILE: must be a mapping of flag names to values"),
    ],
)
def test_bad_yaml(tmp_path, text, problem):
    assert parse_file(tmp_path, text) == ({}, [problem])


@pytest.mark.parametrize("content", ["lr: [1", "a: b: c", "\tlr: 1", "lr: !!python/name:os.system", b"\xff\xfe\x00l"])
def test_what_is_no_yaml_at_all(tmp_path, content):
    values, (problem,) = parse_file(tmp_path, content)
    assert values == {}
    assert problem.startswith("--training_config FILE: not valid YAML (")
    assert "\n" not in problem


def test_yaml_file_that_cannot_be_read(tmp_path):
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        problems = []
        assert flags.parse_yaml(FLAGS, str(path), problems) == {}
        assert problems == [f"--training_config {path}: cannot be read ({reason})"]


def test_all_problems_of_a_yaml_file_are_collected(tmp_path):
    values, problems = parse_file(tmp_path, "lr: x\nrnk: 3\nrank: 0\nseed: 5\n")
    assert values == {"seed": 5}
    assert len(problems) == 3


def test_the_command_line_wins_over_yaml(tmp_path, command):
    path = tmp_path / "settings.yaml"
    path.write_text("lora_r: 4\nlr: 3e-3\nmethod: galore\ngalore_scale: 0.25\n")
    argv = command(lr=None, training_config=path)
    config = cli.load(argv).config
    assert (config.method.rank, config.optimizer.lr, config.method.scale) == (4, 3e-3, 0.25)
    assert config.optimizer.clip_grad_norm == 0  # what the spelling galore_scale means holds in a file, too
    # Given under another name, and before the file.
    config = cli.load(["--rank", "8", "--scale", "0.5", *argv]).config
    assert (config.method.rank, config.optimizer.lr, config.method.scale) == (8, 3e-3, 0.5)
    assert config.optimizer.clip_grad_norm == 1


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
from peft_pretraining import cli
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
