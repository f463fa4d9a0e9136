"""Reading metrics.jsonl, whatever is in it."""

from __future__ import annotations

import pytest

from peft_pretraining.checkpoint import metrics_file

GOOD = b'{"update_step": 1, "loss": 5.0}\n'


def read(tmp_path, content: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    records, problems = metrics_file.read_records(path)
    return records, [problem.replace(str(path), "FILE") for problem in problems]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"update_step": 2, "lo', "is cut off or no JSON"),
        (b'{"update_step": 2, "loss": 5.0}{"update_step": 3}\n', "is cut off or no JSON"),
        (b'\xff\xfe{"update_step": 2}\n', "is not UTF-8"),
        (b"\0\0\0\0\n", "is cut off or no JSON"),
        (b"[1, 2]\n", "is no JSON object"),
        (b"null\n", "is no JSON object"),
        (b"{}\n", "has no update_step"),
        (b'{"update_step": null}\n', "has no update_step"),
        (b'{"update_step": true}\n', "has no update_step"),
        (b'{"update_step": 1.5}\n', "has no update_step"),
        (b'{"update_step": NaN}\n', "has no update_step"),
        (b'{"update_step": 2, "x": ' + b"9" * 5000 + b"}\n", "is cut off or no JSON"),
        (b'{"update_step": 2, "x": ' + b"[" * 100_000 + b"\n", "is nested too deeply"),
        (b'{"update_step": 2, "x": "' + b"y" * (3 << 20) + b'"}\n', "is longer than 1 MiB"),
    ],
    ids=range(14),
)
def test_a_line_that_is_no_record_is_passed_over_and_named(tmp_path, line, reason):
    records, problems = read(tmp_path, GOOD + line)
    assert records == [{"update_step": 1, "loss": 5.0}]
    assert problems == [f"FILE: passed over 1 line(s): line 2 {reason}"]


def test_what_follows_a_bad_line_is_read(tmp_path):
    records, problems = read(tmp_path, b'x\n{"update_step": 1}\r\n\n' + b"y\n" * 8 + b'{"update_step": 2}')
    assert records == [{"update_step": 1}, {"update_step": 2}]
    assert len(problems) == 1 and "passed over 9 line(s)" in problems[0] and "and 4 more" in problems[0]


def test_numbers_that_are_not_finite_are_none(tmp_path):
    line = b'\xef\xbb\xbf{"update_step": 1, "loss": NaN, "lr": 1e999, "grad_norm": -Infinity, "spike": null}\n'
    none = {"loss": None, "lr": None, "grad_norm": None, "spike": None}
    assert read(tmp_path, line) == ([{"update_step": 1, **none}], [])


def test_a_file_that_is_missing_or_a_folder_has_no_records(tmp_path):
    assert metrics_file.read_records(tmp_path) == ([], [f"{tmp_path}: cannot be read (Is a directory)"])
    missing = tmp_path / "missing"
    assert metrics_file.read_records(missing) == ([], [f"{missing}: cannot be read (No such file or directory)"])
    assert read(tmp_path, b"") == ([], [])


def test_missing_updates_are_counted_whatever_the_bounds():
    from peft_pretraining.checkpoint.resumed_metrics import _missing

    assert _missing({3, 4, 6}, 1, 7) == (4, 1, 7)
    assert _missing({1, 2, 3, 6, 7}, 1, 7) == (2, 4, 5)
    assert _missing({1, 2, 3}, 1, 3) is None
    assert _missing({1}, 1, 10**15) == (10**15 - 1, 2, 10**15)  # of a file that somebody made up
