"""Reports of runs: what is read, averaged and written, whatever has become of the runs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import statistics
import sys

import helpers
import pytest
from report_helpers import copy

from peft_pretraining.checkpoint import folder_lock
from peft_pretraining.report import __main__ as report
from peft_pretraining.report import figures, finding, rows
from peft_pretraining.report.grouping import best_of_each, grouped, sweeps


@pytest.fixture
def runs(small_study):
    return small_study


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are drawn and not saved, which takes most of their time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **settings: None)


def read(*paths):
    warnings: list[str] = []
    return finding.find(paths, warnings), warnings


def as_csv(out):
    with open(out / "report.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def final(run):
    return [record for record in helpers.records(run) if "final_eval_loss" in record][-1]


def test_a_study_is_reported(runs, tmp_path, capsys):
    out = tmp_path / "new" / "report"
    assert report.main([str(runs), "--out", str(out)]) == 0
    assert capsys.readouterr() == (f"{out / 'report.html'}\n", "")
    for name in figures.NAMES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    found = as_csv(out)
    assert list(found) == ["full_rank/seed1", "full_rank/seed2", "galore/lr0.01", "galore/lr0.02"]
    for name, row in found.items():
        records = helpers.records(runs / name)
        updates = [record for record in records if "loss" in record]
        perplexities = [r["final_eval_perplexity"] for r in records if "final_eval_loss" in r]
        assert float(row["final loss"]) == final(runs / name)["final_eval_loss"]
        assert float(row["final perplexity"]) == perplexities[-1]
        assert float(row["best perplexity"]) == min(perplexities)
        assert float(row["tokens/s"]) == statistics.median(update["throughput_tokens"] for update in updates)
        assert float(row["tokens"]) == updates[-1]["tokens_seen"]
        assert float(row["peak memory (GiB)"]) == max(update["peak_memory_bytes"] for update in updates) / 2**30
        assert float(row["state (MB)"]) == final(runs / name)["optimizer_state_bytes"] / 1e6
        assert float(row["time (s)"]) == pytest.approx(sum(update["step_time"] for update in updates))
        assert (row["updates"], row["state"], row["skipped"], row["restarts"]) == ("6", "finished", "0", "0")
        assert row["MFU (%)"] == ""  # of a CPU
    assert found["galore/lr0.02"]["rates"] == "matrices, embedding, head, norms 0.02"
    assert [row["differs in"] for row in found.values()] == ["adam_eps=1e-08", "adam_eps=1e-08", "lr=0.01", "lr=0.02"]


def test_seeds_are_averaged(runs, tmp_path):
    found, warnings = read(runs)
    seeds, low, high = grouped(found)
    assert warnings == [] and (seeds.label, low.label, high.label) == ("full_rank", "galore lr=0.01", "galore lr=0.02")
    one, two = (final(runs / f"full_rank/seed{seed}")["final_eval_perplexity"] for seed in (1, 2))
    assert one != two
    point = seeds.curve()[-1]
    assert (point.perplexity, point.low, point.high, point.count) == (
        pytest.approx((one + two) / 2),
        min(one, two),
        max(one, two),
        2,
    )
    assert [point.tokens for point in seeds.curve()] == [record["tokens_seen"] for record in evaluations(runs)]
    cell = rows.of_series(seeds)["final perplexity"]
    assert cell.text == f"{(one + two) / 2:,.2f} ± {statistics.stdev([one, two]):,.2f}"
    (tmp_path / "report").mkdir()
    markdown = rows.markdown([seeds, low, high])
    assert "| full_rank (2 seeds) |" in markdown and "| full_rank/seed2 |" in markdown.partition("## Every run")[2]


def evaluations(runs):
    return [r for r in helpers.records(runs / "full_rank/seed1") if "final_eval_loss" in r]


def test_rates_are_compared_at_the_seeds_that_all_have(runs, tmp_path):
    """The mean of more seeds at one rate would compare seeds, not rates."""
    copy(runs / "galore/lr0.01", tmp_path / "a" / "lr0.01")
    copy(runs / "galore/lr0.02", tmp_path / "a" / "lr0.02")
    worse = [
        {**record, "final_eval_perplexity": 900.0} if "final_eval_loss" in record else record
        for record in helpers.records(runs / "galore/lr0.02")
    ]
    copy(runs / "galore/lr0.02", tmp_path / "a" / "lr0.02_seed2", worse, seed=2)
    series = grouped(read(tmp_path)[0])
    (sweep,) = sweeps(series)
    assert sweep.label == "galore" and sweep.rates == (0.01, 0.02)
    expected = [final(runs / f"galore/lr{rate}")["final_eval_perplexity"] for rate in ("0.01", "0.02")]
    assert [point.perplexity for point in sweep.points] == expected
    assert [one.rate for one in best_of_each(series)] == [0.01]


def test_rates_that_go_together_are_one_sweep(runs, tmp_path):
    for rate in (0.01, 0.02, 0.04):
        copy(runs / "galore/lr0.01", tmp_path / f"{rate}", lr=rate, head_lr=rate)
    (sweep,) = sweeps(grouped(read(tmp_path)[0]))
    assert sweep.rates == (0.01, 0.02, 0.04)


def test_repetitions_are_not_averaged(runs, tmp_path):
    for name in ("one", "two"):
        copy(runs / "galore/lr0.01", tmp_path / name)
    series = grouped(read(tmp_path)[0])
    assert [one.label for one in series] == ["galore (one)", "galore (two)"]


def test_paths_with_the_seed_in_them_make_no_other_run(runs, tmp_path):
    for seed in (1, 2):
        warm_up = f"/study/warm_up_seed{seed}/model_5"
        copy(runs / "galore/lr0.01", tmp_path / f"{seed}", seed=seed, warmed_up_model=warm_up)
    (series,) = grouped(read(tmp_path)[0])
    assert len(series.runs) == 2


def test_links_to_runs_are_followed_and_each_run_is_read_once(runs, tmp_path):
    (tmp_path / "linked").symlink_to(runs / "galore")
    (tmp_path / "again").symlink_to(runs / "galore" / "lr0.01")
    (tmp_path / "circle").symlink_to(tmp_path)
    found, warnings = read(tmp_path, runs / "galore" / "lr0.01")
    assert sorted(run.name for run in found) == ["lr0.01", "lr0.02"] and warnings == []


def test_speeds_that_some_runs_do_not_tell_are_averaged_over_the_others(runs, tmp_path):
    copy(runs / "full_rank/seed1", tmp_path / "1")
    copy(runs / "full_rank/seed2", tmp_path / "2", older(helpers.records(runs / "full_rank/seed2")))
    (series,) = grouped(read(tmp_path)[0])
    ((first,), _) = read(tmp_path / "1")
    assert rows.of_series(series)["tokens/s"].value == first.tokens_per_second
    assert " ± " in rows.of_series(series)["final perplexity"].text


# What has become of a run.


def cut(records):
    """The last line as a killed or a writing process leaves it."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)[:-9]


def without_evaluations(records):
    return [record for record in records if "loss" in record]


def diverged(records, since=0):
    nothing = {"final_eval_loss": None, "final_eval_perplexity": None}
    return [
        record | (nothing if "final_eval_loss" in record else {"loss": None})
        if record["update_step"] >= since
        else record
        for record in records
    ]


def replayed(records):
    """A run that was killed at 6 and went on at 3, in a file from which nothing was removed."""
    steps = [3, *(record["update_step"] for record in records)]
    again = next(i for i, step in enumerate(steps[1:]) if step == 4)
    return [*records[:-1], *({**record, "step_time": 5.0} for record in records[again:])]


def older(records):
    kept = ("update_step", "loss", "tokens_seen", "final_eval_loss")
    return [{name: value for name, value in record.items() if name in kept} for record in records]


@pytest.mark.parametrize(
    ("change", "updates", "final_perplexity", "restarts", "warned"),
    [
        (cut, "6", "second", "0", "is cut off"),
        (without_evaluations, "6", "", "0", None),
        (diverged, "6", "", "0", None),
        (replayed, "6", "last", "1", None),
        (older, "6", "last", "0", None),
        (lambda records: [], "0", "", "0", None),
        (lambda records: records[:1], "0", "first", "0", None),
    ],
    ids=["cut", "not evaluated", "diverged", "replayed", "older", "only begun", "evaluated once"],
)
def test_runs_in_any_state_are_reported(
    runs, tmp_path, capsys, unsaved, change, updates, final_perplexity, restarts, warned
):
    whole = runs / "galore/lr0.01"
    records = helpers.records(whole)
    copy(whole, tmp_path / "runs" / "one", change(records))
    assert report.main([str(tmp_path / "runs" / "one"), str(runs), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert (warned in said and said.count("\n") == 1) if warned else said == ""
    (row,) = (row for name, row in as_csv(tmp_path / "out").items() if name.endswith("one"))
    assert (row["updates"], row["restarts"]) == (updates, restarts)
    known = [record["final_eval_perplexity"] for record in records if "final_eval_loss" in record]
    which = {"first": known[0], "second": known[1], "last": known[-1]}
    assert row["final perplexity"] == ("" if final_perplexity == "" else str(which[final_perplexity]))
    text = (tmp_path / "out" / "report.html").read_text()
    data = text.partition('id="data">')[2].partition("</script>")[0]
    json.loads(data, parse_constant=pytest.fail)
    if change is replayed:  # the updates 4 to 6 once, as they were made the last time
        assert float(row["time (s)"]) == pytest.approx(15 + sum(r["step_time"] for r in records[:4] if "loss" in r))


def test_a_seed_that_diverged_is_told(runs, tmp_path, unsaved):
    copy(runs / "full_rank/seed1", tmp_path / "1")
    copy(runs / "full_rank/seed2", tmp_path / "2", diverged(helpers.records(runs / "full_rank/seed2"), 4))
    (series,) = grouped(read(tmp_path)[0])
    assert len(series.curve()) == 2
    row = rows.of_series(series)
    assert row["final perplexity"].text == "1 of 2 not finite" and row["final perplexity"].value is None
    assert figures.write([series], tmp_path)


def test_means_are_over_the_runs_that_got_furthest(runs, tmp_path):
    records = helpers.records(runs / "full_rank/seed2")
    copy(runs / "full_rank/seed1", tmp_path / "1")
    copy(runs / "full_rank/seed2", tmp_path / "2", [record for record in records if record["update_step"] <= 4])
    (series,) = grouped(read(tmp_path)[0])
    row = rows.of_series(series)
    assert row["name"].text == "full_rank (1 of 2 seeds)" and row["state"].text == "1 finished, 1 stopped"
    assert row["final perplexity"].value == final(runs / "full_rank/seed1")["final_eval_perplexity"]
    assert [point.count for point in series.curve()] == [1, 1, 1]


def test_a_resumed_run_counts_its_restarts(command, tmp_path):
    """Also that of a run that was killed before its next checkpoint, whose records are made again."""
    changes = {"num_training_steps": 6, "save_every": 2, "eval_every": 6}
    helpers.stop_after(2, command(**changes))
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    helpers.stop_after(4, [*command(**changes), *helpers.RESUME])
    shutil.rmtree(tmp_path / "run" / "model_4")  # as if it had been killed before that
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(whole)
    assert helpers.run([*command(**changes), *helpers.RESUME]) == 0
    ((run,), _) = read(tmp_path / "run")
    assert run.restarts == 2 and run.step == 6 and len(run.updates) == 6
    assert [record.get("restarts") for record in run.updates] == [None, None, 2, None, None, None]


@pytest.mark.parametrize("owner", ["alive", "dead", "elsewhere", "elsewhere long ago"])
def test_a_run_that_goes_on_is_told_from_one_that_was_stopped(runs, tmp_path, owner):
    records = [record for record in helpers.records(runs / "galore/lr0.01") if record["update_step"] <= 4]
    run = copy(runs / "galore/lr0.01", tmp_path / "run", records)
    host = socket.gethostname() if owner in ("alive", "dead") else "node7"
    held = {"host": host, "pid": os.getpid() if owner == "alive" else 2**22 + 5, "started": "now", "launcher": None}
    (run / folder_lock.OWNER_FILE).write_text(json.dumps(held))
    (run / folder_lock.LOCK_FILE).touch()
    if owner == "elsewhere long ago":
        os.utime(run / folder_lock.LOCK_FILE, (1e9, 1e9))
    ((found,), _) = read(run)
    going_on = owner in ("alive", "elsewhere")
    assert found.state == ("running" if going_on else "stopped")
    assert (found.seconds_left is not None) == going_on
    if going_on:
        assert found.seconds_left == pytest.approx(
            2 * statistics.median(r["step_time"] for r in records if "loss" in r)
        )


# What cannot be reported.


def test_folders_without_runs_are_refused_in_one_line_each(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = copy(runs / "galore/lr0.01", tmp_path / "broken")
    (broken / "config.yaml").write_text("settings: [1")
    wrong = [str(tmp_path / name) for name in ("empty", "missing", "broken")]
    assert report.main([str(runs), *wrong, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "is not the folder of a run" in lines[0] and "flow sequence" in lines[2]
    assert not (tmp_path / "out").exists()


def test_one_bad_run_of_a_study_is_a_warning(runs, tmp_path, capsys, unsaved):
    for name in ("one", "two"):
        copy(runs / "galore/lr0.01", tmp_path / "study" / name)
    (tmp_path / "study/two/config.yaml").write_text("settings: {rank: 4}")
    assert report.main([str(tmp_path / "study"), "--out", str(tmp_path / "out")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "names no method" in line
    assert list(as_csv(tmp_path / "out")) == ["one"]


def test_an_out_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert report.main([str(runs), "--out", str(tmp_path / "file")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out ") and "File exists" in line


def test_nothing_to_do_is_refused(runs, capsys):
    assert report.main([str(runs)]) == 2
    assert "give --out DIR, --watch, or both" in capsys.readouterr().err


def test_without_plotly_the_rest_is_written(runs, tmp_path, capsys, monkeypatch, unsaved):
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert report.main([str(runs), "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'report.md'}\n" and not (tmp_path / "report.html").exists()
    (line,) = captured.err.splitlines()
    assert line.startswith("warning: plotly is not installed") and "peft_pretraining[report]" in line
    assert "(perplexity_over_tokens.png)" in (tmp_path / "report.md").read_text()


def test_figures_of_an_earlier_report_do_not_stay(runs, tmp_path, unsaved):
    (tmp_path / "rate_sensitivity.png").touch()
    assert figures.write(grouped(read(runs)[0]), tmp_path) == list(figures.NAMES)
    assert (tmp_path / "rate_sensitivity.png").exists()
    written = figures.write(grouped(read(runs / "galore/lr0.01")[0]), tmp_path)
    assert "rate_sensitivity" not in written and not (tmp_path / "rate_sensitivity.png").exists()


def test_names_are_escaped_in_markdown(runs, tmp_path, unsaved):
    copy(runs / "galore/lr0.01", tmp_path / "a|b\n<i>*[x]")
    copy(runs / "galore/lr0.02", tmp_path / "$\\frac_é日")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--title", "<b>|"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# &lt;b>\\|\n") and "<i>" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
