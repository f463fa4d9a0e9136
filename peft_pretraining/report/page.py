"""The page of a report: one HTML file with everything in it, plotly too, which asks no network for anything."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from peft_pretraining.flags import one_line
from peft_pretraining.report import rows
from peft_pretraining.report.grouping import UNIMPORTANT, Series, best_of_each, short, sweeps
from peft_pretraining.report.styles import DARK, LIGHT, PLOTLY_DASHES, PLOTLY_MARKERS, styles

_MOST_SHOWN = 14
"""Series at first; of more the best rate of each method."""
_FEW = 3
"""Evaluations, below which the training's own perplexity is shown as well."""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_LOWEST = ("best loss", "best perplexity", "final loss", "final perplexity")


def build(series: Sequence[Series], title: str, made: str) -> str:
    """The page. Raises `ModuleNotFoundError` where plotly is not installed."""
    from plotly.offline import get_plotlyjs

    several = any(len(one.runs) > 1 for one in series)
    count = sum(len(one.runs) for one in series)
    about = f"{count} run{'s' * (count != 1)}, made {made}"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(one_line(title))}</title>",
            f"<style>{_file('page.css')}</style></head><body>",
            f"<header><h1>{html.escape(one_line(title))}</h1><p>{html.escape(about)}</p>",
            '<button id="theme" type="button" title="light or dark">Dark</button></header><main>',
            _PLOTS,
            _table(series, several),
            _SETTINGS,
            f"</main><footer>{_FOOTER}</footer>",
            f'<script type="application/json" id="data">{_json(_data(series))}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{_file('page.js')}</script></body></html>",
        ]
    )


_PLOTS = """<h2>Plots</h2><div class="plots"><div class="charts" id="charts"></div>
<nav class="legend" aria-label="runs">
<div class="bar"><button id="show-all" type="button">all</button><button id="show-none" type="button">none</button>
<button id="show-best" type="button" title="of each method the rate with the lowest last perplexity">best</button>
<label><input type="checkbox" id="training"> training, thin</label></div><ul id="legend"></ul></nav></div>"""
_SETTINGS = """<h2>Settings</h2><div class="bar">
<label><input type="checkbox" id="differing"> only those that differ</label>
<input type="search" id="find-setting" placeholder="find a setting" aria-label="find a setting">
<p class="hint">of the runs that the plots show; what is not as in most of them is marked</p></div>
<div class="scroll"><table id="settings"><thead></thead><tbody></tbody></table></div>"""
_FOOTER = """Runs that differ in their seed alone are averaged; bands and bars reach from the lowest to the highest
seed, ± is one standard deviation. Means are over the runs that have got as far as the furthest. Time is that of the
updates, without evaluations and checkpoints."""


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(content: Any) -> str:
    """JSON that no HTML parser takes for an end of its element."""
    return json.dumps(_finite(content), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _data(series: Sequence[Series]) -> dict[str, Any]:
    best = {id(one) for one in best_of_each(series)}
    names = _setting_names(series)
    described: list[dict[str, Any]] = []
    for one, style in zip(series, styles(series), strict=True):
        curve = [vars(point) for point in one.curve()]
        described.append(
            {
                **{"label": one.label, "name": _name(one), "style": vars(style), "best": id(one) in best},
                "folders": ", ".join(run.name for run in one.runs),
                **{"curve": curve, "training": one.training(), "final": _final(one)},
                "state": None if (size := one.runs[0].state_bytes) is None else size / 1e6,
                "settings": [_setting(one, name) for name in names],
            }
        )
    numbers = {id(one): number for number, one in enumerate(series)}
    return {
        "series": described,
        "sweeps": [
            {
                **{"label": sweep.label, "members": [numbers[id(one)] for one in sweep.series], "rates": sweep.rates},
                "perplexities": [point.perplexity for point in sweep.points],
            }
            for sweep in sweeps(series)
        ],
        "unimportant": sorted(UNIMPORTANT - {"seed"}),
        **{"settings": names, "most_shown": _MOST_SHOWN, "light": LIGHT, "dark": DARK},
        **{"markers": PLOTLY_MARKERS, "dashes": PLOTLY_DASHES},
        "show_training": all(len(one["curve"]) < _FEW for one in described),
    }


def _name(series: Series) -> str:
    return series.label if len(series.runs) == 1 else f"{series.label} ({rows.seeds(series)})"


def _final(series: Series) -> dict[str, Any] | None:
    mean = series.final_perplexity()
    finals = [final.perplexity for run in series.counted if (final := series.final(run)) is not None]
    values = [value for value in finals if value is not None]
    return None if mean is None else {"mean": mean, "low": min(values), "high": max(values), "count": len(values)}


def _setting_names(series: Sequence[Series]) -> list[str]:
    """All settings, those that make another run first, then versions."""
    names = dict.fromkeys(name for one in series for run in one.runs for name in run.settings)
    versions = dict.fromkeys(f"version of {name}" for one in series for name in one.runs[0].versions or {})
    kept = [name for name in names if name not in UNIMPORTANT]
    return ["seed", *kept, *(name for name in names if name in UNIMPORTANT - {"seed"}), *versions]


def _setting(series: Series, name: str) -> str:
    """As text; all values, where the runs of the series differ."""
    values = []
    for run in series.runs:
        if name.startswith("version of "):
            value: Any = (run.versions or {}).get(name.removeprefix("version of "))
        else:
            value = run.settings.get(name)
        values.append(one_line(str(value)) if isinstance(value, str) and "/" in value else short(value))
    return ", ".join(dict.fromkeys(values))


def _table(series: Sequence[Series], several: bool) -> str:
    heads = "".join(
        f'<th scope="col" class="{_kind(column)}" title="{html.escape(column.about)}">'
        f'<button type="button">{html.escape(column.title)}</button></th>'
        for column in rows.COLUMNS
    )
    means = [rows.of_series(one) for one in series]
    values = {key: [row[key].value for row in means] for key in _LOWEST}
    lowest = {key: min((v for v in of_key if isinstance(v, float)), default=math.nan) for key, of_key in values.items()}
    lines = []
    for one, row in zip(series, means, strict=True):
        lines.append(_row(row, "mean" if len(one.runs) > 1 else "both", lowest))
        if len(one.runs) > 1:
            lines += [_row(rows.of_run(run, one), "one", lowest) for run in one.runs]
    every = '<label><input type="checkbox" id="every"> every seed</label>' if several else ""
    every = every or '<input type="checkbox" id="every" hidden>'
    return (
        f'<h2>Runs</h2><div class="bar"><input type="search" id="find" placeholder="find a run" '
        f'aria-label="find a run">{every}<p class="hint">click on a head to sort</p></div><div class="scroll">'
        f'<table id="table"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _row(row: rows.Row, kind: str, lowest: Mapping[str, float]) -> str:
    cells = []
    for column in rows.COLUMNS:
        cell = row[column.key]
        text = html.escape(cell.text)
        if column.key == "name":
            cells.append(f'<th scope="row">{text}</th>')
        else:
            value = cell.value if column.digits is not None and cell.value is not None else ""
            kind_of_cell = _kind(column)
            if column.key in ("differs", "rates"):
                kind_of_cell += " long"
            elif kind != "one" and column.key in lowest and cell.value == lowest[column.key]:
                kind_of_cell += " lowest"
            cells.append(f'<td class="{kind_of_cell}" data-value="{value}">{text}</td>')
    return f'<tr data-kind="{kind}">{"".join(cells)}</tr>'


def _kind(column: rows.Column) -> str:
    return "text" if column.digits is None else "number"
