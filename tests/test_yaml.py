"""YAML files: the flags in them, and what is no plain mapping of settings."""

from __future__ import annotations

import os

import pytest
from flag_helpers import FLAGS, parse_file

from peft_pretraining import flags
from peft_pretraining.config import cli
from peft_pretraining.flags import yaml_file


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


def test_yaml_values_stay_the_text_that_was_written(tmp_path):
    assert parse_file(tmp_path, "save_dir: no\ntags: [on, x]\n") == ({"save_dir": "no", "tags": ("on", "x")}, [])
    text = "rank: 010\nsave_dir: 2024-1-1\ntags: [0x10, 1_000, 12:30]\nlr: .5\n"
    values = {"rank": 10, "save_dir": "2024-1-1", "tags": ("0x10", "1_000", "12:30"), "lr": 0.5}
    assert parse_file(tmp_path, text) == (values, [])


TOO_MANY = "not valid YAML (it holds more than 20,000 values, with its aliases written out)"
TAG, NOT_PLAIN = "not valid YAML (line 1: the tag tag:yaml.org,2002:", "is not allowed, only plain values are)"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lora_r: 4\nrank: 8\n", "lora_r and rank are one setting: give it once"),
        ("rank: 4\nlora_r: 4\n", "rank and lora_r are one setting: give it once"),
        ("rank: 4\nlr: 1\nrank: 8\n", "not valid YAML (key 'rank' is given twice, in lines 1 and 3)"),
        ("tags: [{a: 1, a: 2}]", "not valid YAML (key 'a' is given twice, in lines 1 and 1)"),
        ("rank: 4\n'rank': 8\n", "not valid YAML (key 'rank' is given twice, in lines 1 and 2)"),
        (LAUGHS, TOO_MANY),
        ("a: &a {b: *a}", "not valid YAML (line 1: the alias *a names nothing that is complete before it)"),
        ("a: *b", "not valid YAML (line 1: the alias *b names nothing that is complete before it)"),
        ("lr: 1\n---\nlr: 2\n", "not valid YAML (it holds several documents, and one is read)"),
        ("[a]: 1", "not valid YAML (line 1: a key must be a single value)"),
        ("? {a: 1}\n: 1", "not valid YAML (line 1: a key must be a single value)"),
        ("lr: " + "[" * 100_000, "not valid YAML (line 1: it is nested more than 20 deep)"),
        ("- " * 50_000, "not valid YAML (line 1: it is nested more than 20 deep)"),
        ("lr: 1\n" + "#" * 300_000, "not valid YAML (it is larger than 256 KiB)"),
        ("tags: [" + "x," * 30_000 + "]", TOO_MANY),
        ("tags: [[a], b]", "tags must be a single value or a list of them"),
        ("tags: [a, ~]", "tags must be a single value or a list of them"),
        ("yes: 1", "unknown key 'yes'"),
        ("null: 1", "unknown key None"),
        ("lr: !!python/object:os.system 1", f"{TAG}python/object:os.system {NOT_PLAIN}"),
        ("lr: !!python/object/apply:os.system [ls]", f"{TAG}python/object/apply:os.system {NOT_PLAIN}"),
        ("lr: !!binary MQ==", f"{TAG}binary {NOT_PLAIN}"),
        ("lr: !!set {a}", f"{TAG}set {NOT_PLAIN}"),
        ("lr: !mine 1", f"not valid YAML (line 1: the tag !mine {NOT_PLAIN}"),
    ],
    ids=lambda value: value[:20],
)
def test_what_no_settings_need_is_refused_at_once(tmp_path, text, problem):
    values, problems = parse_file(tmp_path, text)
    assert problems == [f"--training_config FILE: {problem}"]
    assert values in ({}, {"rank": 4})  # what stood before it


def test_aliases_and_merges_of_a_sensible_size_are_read(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("p: {q: &b {<<: &a {x: 1, y: 2}, x: 3}}\nc: {<<: [*b, *a], y: 4}\nd: *b\n")
    assert yaml_file.load(path) == {"p": {"q": {"x": 3, "y": 2}}, "c": {"x": 3, "y": 4}, "d": {"x": 3, "y": 2}}


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("pipe", "not valid YAML (it is not a regular file)"),
        ("/dev/zero", "not valid YAML (it is not a regular file)"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
    ):
        problems = []
        assert flags.parse_yaml(FLAGS, str(tmp_path / name), problems) == {}
        assert problems == [f"--training_config {tmp_path / name}: {reason}"]
