"""Which cases of crossed tests wait for the slow tier (scripts/test_slow.sh): others of the same test stay quick.

A test that is long by itself has the mark `slow` where it stands. By file: patterns of names as `fnmatch` reads them,
but with brackets as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

CROSSES: dict[str, tuple[str, ...]] = {
    "test_factor_runs": (
        "test_resume_changes_no_bit[*-6]",
        "test_resume_changes_no_bit[*-13]",
        "test_activation_checkpointing_changes_nothing[relora]",
    ),
    "test_faults": ("test_a_killed_rank_and_a_hanging_one_come_back",),
    "test_resume": (
        "test_stop_and_resume_changes_no_bit[galore-12-*]",
        "test_stop_and_resume_changes_no_bit[full_rank-10-*]",
        "test_resume_across_an_epoch_boundary[17-0]",
        "test_signal_during_an_evaluation[1-0]",
        "test_an_update_that_is_not_finite_is_skipped[full_rank-*]",
    ),
    "test_resume_projection": (
        "test_stop_and_resume_changes_no_bit[adafactor]",
        "test_stop_and_resume_changes_no_bit[lion]",
        "test_stop_and_resume_changes_no_bit[random]",
        "test_stop_and_resume_changes_no_bit[full-rank adamw8bit]",
    ),
    "test_run_tasks": ("test_every_optimizer_learns[adam-*]", "test_every_optimizer_learns[sgd-*]"),
    "test_streamed_runs": (
        "test_stop_in_the_middle_of_a_shard_and_resume_changes_no_bit[3-0-plain]",
        "test_stop_in_the_middle_of_a_shard_and_resume_changes_no_bit[17-1-gz]",
    ),
}
FIRST = (
    "test_faults",
    "test_layouts",
    "test_resume",
    "test_saving",
    "test_streamed_runs",
    "test_factor_runs",
    "test_factor_ranks",
    "test_distributed_projection",
    "test_trust",
)
"""Files that take longest: started first, so that no process has one left when the others are done."""


def sort_into_tiers(items: list[pytest.Item], whole_files: bool) -> None:
    """Mark the crosses, and put the longest files first; the order within files stays.

    whole_files: no test was asked for by name; `pytest.UsageError` for a pattern that then matches nothing.
    """
    unused = {(file, pattern) for file in {item.path.stem for item in items} for pattern in CROSSES.get(file, ())}
    for item in items:
        for pattern in CROSSES.get(item.path.stem, ()):
            if _matches(item.name, pattern):
                item.add_marker(pytest.mark.slow)
                unused.discard((item.path.stem, pattern))
    if unused and whole_files:
        raise pytest.UsageError(f"tests/slow_tier.py: no test has one of the names {_listed(unused)}")
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def repeated(items: Iterable[pytest.Item]) -> set[str]:
    """Identifiers of the cases of each test but its first, which run the same lines again for the most part."""
    seen, again = set(), set()
    for item in items:
        test = (item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name))
        (again.add(item.nodeid) if test in seen else seen.add(test))
    return again


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def _listed(unused: set[tuple[str, str]]) -> str:
    return ", ".join(f"{file}::{pattern}" for file, pattern in sorted(unused))
