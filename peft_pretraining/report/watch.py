"""A table of runs in the terminal, renewed in place; a plain line for each run with news where stdout is none."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TextIO

from peft_pretraining.checkpoint import folder_lock, run_dir
from peft_pretraining.flags import ConfigError
from peft_pretraining.report import finding
from peft_pretraining.report.runs import FINISHED, RUNNING, STOPPED, LoggedRun, number

_NARROWEST_NAME = 16
_ORDER = {RUNNING: 0, STOPPED: 1, FINISHED: 2}


_COLUMNS = {
    "state": ("state", 0),
    "updates": ("updates", 1),
    "loss": ("loss", 3),
    "val loss": ("val loss", 6),
    "perplexity": ("val ppl", 2),
    "best": ("best ppl", 7),
    "lr": ("lr", 8),
    "speed": ("tok/s", 4),
    "mfu": ("MFU", 10),
    "memory": ("GiB", 9),
    "skipped": ("skipped", 11),
    "left": ("ETA", 5),
}
"""Key -> title, and which go first where there is no room: those with the highest number."""


class Reader:
    """Reads the runs in some folders again and again: a run whose files are as they were is not read anew."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._runs: list[LoggedRun] = []
        self._known: dict[Path, tuple[tuple[int, ...], LoggedRun]] = {}

    def read(self) -> list[LoggedRun]:
        """Those that are going on first. Raises `ConfigError` as `finding.find` does, the first time."""
        try:
            self._runs = finding.find(self._paths, [], self._read)
        except ConfigError:
            if not self._runs:
                raise  # later on it is a file that is just being replaced
        return sorted(self._runs, key=lambda run: _ORDER[run.state])

    def _read(self, folder: Path, warnings: list[str]) -> LoggedRun:
        mark = _mark(folder)
        if (known := self._known.get(folder)) is None or known[0] != mark or known[1].state == RUNNING:
            known = self._known[folder] = mark, LoggedRun.read(folder, warnings)
        return known[1]


def _mark(folder: Path) -> tuple[int, ...]:
    """Another one whenever something in the folder has changed that its run is read from."""
    found = []
    for name in (run_dir.METRICS_FILE, run_dir.CONFIG_FILE, folder_lock.LOCK_FILE):
        try:
            seen = (folder / name).stat()
            found += [seen.st_size, seen.st_mtime_ns]
        except OSError:
            found.append(-1)
    return tuple(found)


def watch(paths: Sequence[Path], seconds: float, stream: TextIO | None = None) -> None:
    """Show the runs every so many seconds, until all have finished. Ctrl-C raises `KeyboardInterrupt`."""
    stream = sys.stdout if stream is None else stream
    reader, in_place = Reader(paths), stream.isatty()
    lines, said = 0, dict[Path, str]()
    while True:
        runs = reader.read()
        if in_place:
            size = shutil.get_terminal_size()
            text = table(runs, size.columns, size.lines - 1)
            stream.write((f"\x1b[{lines}F" if lines else "") + "".join(f"{line}\x1b[K\n" for line in text) + "\x1b[J")
            lines = len(text)
        else:
            now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            for run in runs:
                if said.get(run.folder) != (text_of_run := plain(run)):
                    stream.write(f"{now} {text_of_run}\n")
                    said[run.folder] = text_of_run
        stream.flush()
        if all(run.state == FINISHED for run in runs):
            return
        time.sleep(seconds)


def table(runs: Sequence[LoggedRun], width: int, height: int) -> list[str]:
    """Lines of at most so many characters; the columns that fit, and the rows."""
    rows = [cells(run) for run in runs]
    chosen = [key for key in _COLUMNS if key != "mfu" or any(row[key] for row in rows)]
    widths = {key: max(len(_COLUMNS[key][0]), *(len(row[key]) for row in rows)) for key in chosen}
    while len(chosen) > 1 and sum(widths[key] + 2 for key in chosen) > width - _NARROWEST_NAME:
        chosen.remove(max(chosen, key=lambda key: _COLUMNS[key][1]))
    taken = sum(widths[key] + 2 for key in chosen)
    name_width = max(min(max(_width(run.name) for run in runs), width - taken), 3)

    def line(name: str, values: Sequence[str]) -> str:
        shown = (f"  {value:>{widths[key]}}" for key, value in zip(chosen, values, strict=True))
        return _fitted(name, name_width) + "".join(shown)

    counts = ", ".join(f"{n} {state}" for state in _ORDER if (n := sum(run.state == state for run in runs)))
    head = f"{datetime.now():%H:%M:%S}  {counts}"
    body = [line(run.name, [row[key] for key in chosen]) for run, row in zip(runs, rows, strict=True)]
    if len(body) > (most := max(1, height - 3)):
        body = [*body[:most], f"... and {len(body) - most} more"]
    return [text[:width].rstrip() for text in (head, line("run", [_COLUMNS[key][0] for key in chosen]), *body)]


def cells(run: LoggedRun) -> dict[str, str]:
    """What the columns say of a run; empty where its folder does not say."""
    last = run.updates[-1] if run.updates else {}
    final = run.evaluated[-1] if run.evaluated else None
    perplexities = [item.perplexity for item in run.evaluated if item.perplexity is not None]
    mfu, memory = number(last, "mfu"), number(last, "peak_memory_bytes")
    of = "" if run.steps is None else f"/{run.steps}"
    return {
        "state": run.state,
        "updates": f"{run.step}{of}",
        "loss": _text(number(last, "loss"), ".4f") or ("nan" if last else ""),
        "val loss": ("nan" if final.loss is None else f"{final.loss:.4f}") if final else "",
        "perplexity": ("nan" if final.perplexity is None else _digits(final.perplexity)) if final else "",
        "best": _digits(min(perplexities)) if perplexities else "",
        "lr": _text(number(last, "lr"), ".2e"),
        "speed": _count(number(last, "throughput_tokens")),
        "mfu": _text(mfu, ".0%"),
        "memory": "" if memory is None else f"{memory / 2**30:.2f}",
        "skipped": str(run.skipped),
        "left": "" if run.seconds_left is None else str(timedelta(seconds=round(run.seconds_left))),
    }


def plain(run: LoggedRun) -> str:
    """One line: "galore: running, update 40/100, loss 4.1234, ..."."""
    found = cells(run)
    named = {"loss": "loss", "val loss": "val loss", "perplexity": "val perplexity", "lr": "lr", "left": "ETA"}
    parts = [f"{run.name}: {found['state']}", f"update {found['updates']}"]
    parts += [f"{name} {found[key]}" for key, name in named.items() if found[key]]
    return ", ".join([*parts, *([f"{found['speed']} tok/s"] if found["speed"] else [])])


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def _count(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value < 1e4 else f"{value / 1e3:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"


def _width(text: str) -> int:
    """Columns of a terminal: letters such as Chinese ones take two, combining ones none."""
    import unicodedata

    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _fitted(text: str, width: int) -> str:
    """Cut in its middle where it is too long: what tells runs apart stands at either end."""
    if _width(text) > width:
        end = text
        while _width(end) > (width - 1) // 2:
            end = end[1:]
        start = text
        while _width(start) + 1 + _width(end) > width:
            start = start[:-1]
        text = f"{start}…{end}"
    return text + " " * (width - _width(text))
