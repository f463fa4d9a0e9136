"""Hostile input made from good input, and what any of it may do: be taken, or be refused in lines.

The number of examples is multiplied by `--fuzz N` (or the environment's FUZZ): then they are drawn anew each time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from peft_pretraining.flags import ConfigError

TIMES = int(os.environ.get("FUZZ", "0"))
MOST_BYTES = 1 << 30
MOST_SECONDS = 20.0
"""Of computing, for one example; far above what any takes. Waiting without end is left to the time limit of tests."""


def examples(count: int) -> settings:
    """So many examples, the same every time; or `TIMES` as many, other ones every time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count * max(1, TIMES),
        derandomize=not TIMES,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """No more than 1 GB beyond what this process has, nor many seconds of computing."""
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, before[1]))
    began = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - began < MOST_SECONDS


def refused_or_taken(act, *arguments: Any) -> Any:
    """What `act` returns; None where it refuses, which it does in lines that say something.

    Anything else that it raises is a fault, and so is `SystemExit` but for --help and argparse's own refusals.
    """
    with limited():
        try:
            return act(*arguments)
        except ConfigError as error:
            assert error.problems and all(problem.strip() for problem in error.problems), error.problems
        except SystemExit as stopped:
            assert stopped.code in (0, 2)
    return None


NUMBERS = [0, 1, -1, 2, 3, 1.5, 0.0, -0.5, 1e-9, 1e9, 1e308, 2**31, 2**63, 10**30, float("nan"), float("inf")]
TEXTS = [
    *("", " ", "x", "nan", "-inf", "1e999", "٣", "0x10", "1_000", "True", "null", "a\nb", "a\tb", "\r\n", "\x1b[31m"),
    *("../..", "/", ".", "~", "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/environ", "{x}", "%s", "$HOME"),
    *(
        "x" * 300,
        "a/" * 3000,
        "é" * 130,
        "\ufeff",
        "\u202e",
        "a,b,,c",
        ",",
        "-",
        "--",
        "--lr",
        "=",
        "*",
        "**",
        "[",
        "'",
    ),
]
SURROGATES = ["\udcff", "a\udc80b"]
"""What bytes of a command line that are no UTF-8 come as."""

hostile_text = st.sampled_from([*TEXTS, *SURROGATES]) | st.text(max_size=8) | st.sampled_from(NUMBERS).map(str)
hostile_value = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged_json(draw, good: Any) -> bytes:
    """JSON with values replaced, removed or added at any depth, and sometimes bytes of it damaged."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 3))):
        value = _changed(draw, value)
    return draw(damaged_bytes(json.dumps(value).encode()))


def _changed(draw, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        what = draw(st.sampled_from(("replace", "replace", "deeper", "remove", "add")))
        if what == "remove":
            return {name: item for name, item in value.items() if name != key}
        if what == "add":
            return {**value, draw(st.sampled_from(TEXTS)): draw(hostile_value)}
        return {**value, key: _changed(draw, value[key]) if what == "deeper" else draw(hostile_value)}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], _changed(draw, value[index]), *value[index + 1 :]]
    return draw(hostile_value)


_INSERTED = [
    *(b"\xff", b"\x00", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\\ud800", b'"', b"{", b"}", b"]", b"NaN", b"1e999", b"null"),
    *(
        b"9" * 5000,
        b"[" * 20_000,
        b'{"a":' * 5000,
        b"\xc3",
        b"\xe2\x80\xa8",
        b"\x85",
        b",",
        b":",
        b"- ",
        b"&a ",
        b"*a ",
    ),
]


@st.composite
def damaged_bytes(draw, good: bytes) -> bytes:
    """Cut, with pieces doubled, removed or inserted; untouched in about every third case."""
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(good)))
        end = draw(st.integers(at, min(len(good), at + 40)))
        kind = draw(st.sampled_from(("cut", "remove", "double", "insert", "insert")))
        if kind == "cut":
            good = good[:at]
        elif kind == "remove":
            good = good[:at] + good[end:]
        elif kind == "double":
            good = good[:end] + good[at:]
        else:
            good = good[:at] + draw(st.sampled_from(_INSERTED)) + good[at:]
    return good
