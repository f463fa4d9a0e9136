"""Commands that the documentation shows: the blocks of code in Markdown pages, and what a comment above says of each.

<!-- run -->                    executed by tests/test_documented_commands.py, in the order of its page
<!-- tested by tests/x.py -->   executed there
<!-- cluster: why -->           needs several GPUs, a hub or hours; flags and paths are checked all the same
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import helpers

MARK = re.compile(r"<!-- (run|tested by|cluster)(?:: ?| )?(.*?) ?-->")
_BLOCK = re.compile(r"(?:^(?P<before>[^\n]*)\n)?^```(?:bash|sh|console)\n(?P<text>.*?)^```$", re.S | re.M)
_PROGRAM = re.compile(r"^(?:[A-Z_]+=\S+\s+)*(?:(?:sbatch|exec)\s+(?:--\w+ \S+\s+)*)?")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    mark: str
    """run, tested by, cluster, or nothing."""
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Words of each command, continued lines joined, comments and shell assignments left out, and those of each
        command substitution as commands of their own."""
        text = re.sub(r"\\\n\s*", " ", self.text)
        variables = dict(re.findall(r'^(\w+)=("[^"]*"|\S*)$', text, re.S | re.M))
        text = re.sub(r'^(\w+)=("[^"]*"|\S*)$', "", text, flags=re.M)
        for name, value in variables.items():
            text = text.replace(f"${name}", value.strip('"').replace("\n", " "))
        found = []
        for line in text.splitlines():
            found += [shlex.split(inner, comments=True) for inner in re.findall(r"\$\(([^()]*)\)", line)]
            found += [part for part in _split(re.sub(r"\$\([^()]*\)", "", line)) if part]
        return found


def _split(line: str) -> Iterator[list[str]]:
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in ("&&", "|", ";"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def pages() -> list[Path]:
    root = helpers.PROJECT
    return [
        root / "README.md",
        root / "CONTRIBUTING.md",
        *sorted((root / "docs").rglob("*.md")),
        *sorted((root / "examples").rglob("*.md")),
    ]


def blocks() -> list[Block]:
    found = []
    for page in pages():
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            mark = MARK.search(match["before"] or "")
            line = text.count("\n", 0, match.start("text"))
            name = str(page.relative_to(helpers.PROJECT))
            found.append(Block(name, line, mark[1] if mark else "", mark[2] if mark else "", match["text"]))
    return found
