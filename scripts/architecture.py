"""Draw which parts of the project import which, from the code itself: docs/architecture.svg.

    python scripts/architecture.py                # draw, and print the numbers
    python scripts/architecture.py --list         # every arrow between two parts, with the files it comes from

A part is a folder of the package, or a module in its root. An arrow points from the part that imports to the one that
is imported; parts stand above whatever they import, so that an arrow that runs up again belongs to a circle. Arrows
that a way over other parts says already are left out of the picture.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = "peft_pretraining"
ENTRIES = ("torchrun_main.py", "pretokenize.py", "run_glue.py", "run_tasks.py")
PICTURE = PROJECT / "docs" / "architecture.svg"

Arrows = dict[tuple[str, str], list[tuple[str, str]]]
"""(importing part, imported part) -> (importing file, imported module) behind it."""


def imported_modules(path: Path) -> Iterator[str]:
    """Yields the full names of the project's modules that a file imports, those for type checkers alone left out."""
    for node in _executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if _is_module(full) else node.module


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Walks a tree without what stands below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _executed(node)


def _is_module(name: str) -> bool:
    path = PROJECT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part_of(module: str) -> str:
    """Returns the part that a module (`a.b.c`) belongs to: `b`, or `entry points`."""
    pieces = module.split(".")
    if pieces[0] != PACKAGE:
        return "entry points"
    return pieces[1] if len(pieces) > 1 else PACKAGE


def arrows(part=part_of) -> Arrows:
    """Returns the imports between parts, as `part` names the part of a module."""
    found: Arrows = defaultdict(list)
    files = [PROJECT / name for name in ENTRIES] + sorted((PROJECT / PACKAGE).rglob("*.py"))
    for path in files:
        module = ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
        for target in imported_modules(path):
            if part(module) != part(target):
                found[part(module), part(target)].append((module, target))
    return dict(found)


def layers(pairs: Sequence[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the parts from the lowest layer up, and the circles among them (each drawn in one layer)."""
    import networkx

    graph = networkx.DiGraph(pairs)
    circles = [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]
    whole = networkx.condensation(graph)
    height: dict[int, int] = {}
    for node in reversed(list(networkx.topological_sort(whole))):
        height[node] = 1 + max((height[below] for below in whole.successors(node)), default=-1)
    found: list[list[str]] = [[] for _ in range(max(height.values(), default=0) + 1)]
    for node, level in height.items():
        found[level].extend(sorted(whole.nodes[node]["members"]))
    return found, circles


def drawn(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that no way over other parts says already, and those of circles."""
    import networkx

    graph = networkx.DiGraph(pairs)
    if not networkx.is_directed_acyclic_graph(graph):
        return sorted(pairs)
    return sorted(networkx.transitive_reduction(graph).edges)


def draw(found: Arrows, path: Path) -> None:
    """Writes the picture. Same code, same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = PACKAGE
    from matplotlib import pyplot

    rows, _ = layers(list(found))
    width = max(len(row) for row in rows)
    place = {}
    for level, row in enumerate(rows):
        for index, name in enumerate(row):
            place[name] = ((index + 0.5) * width / len(row), level)
    figure, axes = pyplot.subplots(figsize=(2.0 * width + 1, 0.8 * len(rows) + 0.5))
    for above, below in drawn(list(found)):
        start, end = place[above], place[below]
        up = end[1] >= start[1]
        style = {"arrowstyle": "-|>", "lw": 0.7, "color": "tab:red" if up else "0.6", "shrinkA": 11, "shrinkB": 11}
        axes.annotate("", end, start, arrowprops={**style, "connectionstyle": "arc3,rad=0.08"}, zorder=1)
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "tab:blue"}
        axes.text(x, y, name, ha="center", va="center", fontsize=9, bbox=box, zorder=2)
    axes.set_xlim(-0.2, width + 0.2)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every arrow with the imports behind it")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where to draw (default: docs/architecture.svg)")
    options = parser.parse_args(argv)
    found = arrows()
    rows, circles = layers(list(found))
    if options.list:
        for (above, below), imports in sorted(found.items()):
            print(f"{above} -> {below}")
            for source, target in sorted(set(imports)):
                print(f"    {source} imports {target}")
        return 0
    draw(found, options.out)
    print(f"{sum(map(len, rows))} parts, {len(rows)} layers, {len(found)} arrows, {len(circles)} circles")
    for circle in circles:
        print("circle:", ", ".join(circle))
    return 0


if __name__ == "__main__":
    sys.exit(main())
