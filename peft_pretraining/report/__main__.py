"""Report on runs, also while they are going on: tables, figures for a paper, and one page to look at.

    python -m peft_pretraining.report RUN [RUN ...] --out DIR      # report.html, report.md, report.csv, *.png, *.pdf
    python -m peft_pretraining.report RUN [RUN ...] --watch        # a table in the terminal, every 5 seconds

RUN is the folder of a run, or one with runs in it at any depth, such as a study's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.flags import ConfigError, exit_with_problems, one_line
from peft_pretraining.report import figures, finding, page, rows
from peft_pretraining.report.grouping import Series, best_of_each, grouped
from peft_pretraining.report.watch import watch

_EXTRA = "pip install 'peft_pretraining[report]'"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = _parser(prog).parse_args(argv)
    if arguments.out is None and arguments.watch is None:
        return exit_with_problems(ConfigError(["nothing to do: give --out DIR, --watch, or both"]))
    try:
        if arguments.watch is not None:
            _watch(arguments.runs, arguments.watch)
        if arguments.out is not None:
            _write(arguments.runs, arguments.out, arguments.title)
    except ConfigError as error:
        return exit_with_problems(error)
    except BrokenPipeError:  # `--watch | head`: nobody reads on, also not what Python would still write at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m peft_pretraining.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or folders with runs in them"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report is written")
    parser.add_argument("--title", default="Training runs", help="of the page")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=5.0,
        type=_seconds,
        metavar="SECONDS",
        help="a table in the terminal, renewed every so many seconds (5) until all runs have finished, or Ctrl-C; "
        "--out is written after that",
    )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"must be between 0.1 and 86400 seconds, not {text}")
    return seconds


def _watch(paths: Sequence[Path], seconds: float) -> None:
    try:
        watch(paths, seconds)
    except KeyboardInterrupt:
        print()


def _write(paths: Sequence[Path], out: Path, title: str) -> None:
    """Raises `ConfigError` for folders that hold no run, and an `out` that cannot be written."""
    warnings: list[str] = []
    series = grouped(finding.find(paths, warnings))
    for warning in warnings:
        print(f"warning: {one_line(warning)}", file=sys.stderr)
    try:
        out.mkdir(parents=True, exist_ok=True)
        run_dir.write_atomically(out / "report.csv", rows.as_csv(series))
        drawn = []
        if _installed("matplotlib", "no figures"):
            drawn = figures.write(series, out)
        run_dir.write_atomically(out / "report.md", _markdown(series, title, drawn))
        if _installed("plotly", "no report.html"):
            made = f"{datetime.now():%Y-%m-%d %H:%M}"
            run_dir.write_atomically(out / "report.html", page.build(series, title, made))
    except OSError as error:
        raise ConfigError([f"--out {out}: cannot be written ({error.strerror})"]) from None
    print(out / ("report.html" if (out / "report.html").exists() else "report.md"))


def _installed(module: str, without: str) -> bool:
    try:
        importlib.import_module(module)
        return True
    except ImportError:
        pass
    print(f"warning: {module} is not installed, so there is {without}: {_EXTRA}", file=sys.stderr)
    return False


def _markdown(series: Sequence[Series], title: str, drawn: Sequence[str]) -> str:
    parts = [f"# {rows.escaped(title)}", rows.markdown(series)]
    if drawn:
        parts.append("## Figures")
        if len(best_of_each(series)) < len(series):
            parts.append("Of runs that differ in `--lr` alone the figures show the best, that over the rate all.")
        parts += [f"![{figures.NAMES[name]}]({name}.png)" for name in drawn]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
