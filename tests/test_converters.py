"""From the text of a setting to its value."""

from __future__ import annotations

import pytest
from flag_helpers import parse

from peft_pretraining import flags


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


@pytest.mark.parametrize("text", ["٣", "1２", " 3", "3 ", "3\n", "\xa03", "−3"])
def test_numbers_are_written_in_ascii(text):
    assert parse(f"--rank={text}")[1] == [f"--rank must be an integer, got {text!r}"]
    assert parse(f"--lr={text}")[1] == [f"--lr must be a number, got {text!r}"]
    assert len(parse(f"--tokens={text}")[1]) == 1


@pytest.mark.parametrize("text", ["9223372036854775808", "-9223372036854775808", "9" * 4000])
def test_integers_beyond_64_bits_are_refused(text):
    (problem,) = parse(f"--seed={text}")[1]
    bound = "least -9223372036854775807" if text.startswith("-") else "most 9223372036854775807"
    assert problem.startswith(f"--seed must be at {bound}, got ") and len(problem) < 300
    assert parse("--seed=9223372036854775807") == ({"seed": 2**63 - 1}, [])
    assert parse("--tokens=1e19")[1] == ["--tokens must be at most 9223372036854775807 tokens, got '1e19'"]
    assert parse("--seed=" + "9" * 5000)[1][0].startswith("--seed must be an integer, got ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must not be empty"),
        ("a\0b", "must not contain NUL bytes"),
        ("a\udcff", "must be UTF-8"),
        ("x" * 256, "has a name of 256 bytes, and file systems allow 255"),
        ("/tmp/" + "ä" * 128, "has a name of 256 bytes, and file systems allow 255"),
        ("/" + "abc/" * 1000, "is a path of 4000 bytes, and at most 3800 can be used"),
    ],
    ids=range(6),
)
def test_names_and_paths_that_cannot_be(text, problem):
    (found,) = parse(f"--save_dir={text}")[1]
    assert found.startswith(f"--save_dir {problem}, got ") and len(found) < 400


def test_names_that_can_be():
    for text in ("x" * 255, "a/" * 300, "new\nline", "ä b"):
        assert parse(f"--save_dir={text}") == ({"save_dir": text}, [])
