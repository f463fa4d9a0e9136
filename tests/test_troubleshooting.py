"""Messages and flags that docs/troubleshooting.md quotes are those of the code."""

from __future__ import annotations

import ast
import re

import helpers
import pytest

from peft_pretraining.config import cli

PAGE = (helpers.PROJECT / "docs" / "troubleshooting.md").read_text()
QUOTES = [line for block in re.findall(r"```text\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
OF_TORCH = "CUDA out of memory."


@pytest.fixture(scope="module")
def written() -> list[str]:
    """Each string that the code holds, what a format fills in as `…`."""
    found = []
    for path in (helpers.PROJECT / "peft_pretraining").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [re.sub(r"%(\.\d+)?[a-z]", "…", " ".join(text.split())) for text in found]


@pytest.mark.parametrize("quote", QUOTES)
def test_the_program_says_so(quote, written):
    pieces = [piece.strip(" ;:,.()") for piece in quote.removeprefix(OF_TORCH).split("…")]
    pieces = [piece for piece in pieces if len(piece) > 5]
    assert pieces, "nothing that is always so"
    for piece in pieces:
        assert any(piece in text for text in written), f"{piece!r} is nowhere in the code"


def test_flags_exist():
    known = {f"--{name}" for flag in cli.all_flags() for name in (flag.name, *flag.foreign)}
    named = set(re.findall(r"--[a-z]\w+", re.sub(r"```text.*?```", "", PAGE, flags=re.S)))
    others = {"--device", "--dry_run", "--rdzv_endpoint", "--help"}  # of the plan and the launchers
    assert named - others <= known, sorted(named - others - known)
