"""`experiments/non_convergence.py` as a command: its flags, the older command lines, and the files it writes."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

sys.path.insert(0, str(helpers.PROJECT / "experiments"))

import descent
import non_convergence
import non_convergence_config as config
import non_convergence_report as report

from peft_pretraining.flags import ConfigError


def load(*argv):
    return config.load(argv, description="")


def runs(*argv):
    return load(*argv)[0].runs()


# Flags


def test_default_is_everything():
    every = runs()
    assert [(run.optimizer, run.method) for run in every] == [(o, m) for o in config.OPTIMIZERS for m in config.METHODS]
    first, last = every[0], every[-1]
    assert dataclasses.asdict(first) == {
        **{"method": "galore", "optimizer": "sgd", "seed": 42, "steps": 200_000, "lr": 3e-5, "update_proj_gap": 100},
        **{"svd_draws": 1, "rand_ratio": None, "n": 10, "rank": 4, "sigma": 1.0, "sample_every": 500},
    }
    assert (last.method, last.svd_draws) == ("large_batch", 1000)
    assert [run.rand_ratio for run in every if run.method == "golore"] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--type 0 --optimizer SGD", {"method": "galore", "svd_draws": 1}),
        ("--type 0 --optimizer SGD --grad_accumulation 1", {"method": "galore", "svd_draws": 1}),
        ("--type 0 --optimizer SGD --grad_accumulation 64", {"method": "large_batch", "svd_draws": 64}),
        ("--type 1 --optimizer AdamW --epoch 500 --seed 7", {"method": "full", "steps": 500, "seed": 7}),
        ("--type 2 --optimizer AdamW --rand_ratio 0.3 --T 50", {"rand_ratio": 0.3, "update_proj_gap": 50}),
        ("--type=2 --optimizer=sgd --grad_accumulation=16", {"method": "golore", "rand_ratio": 0.25, "svd_draws": 16}),
    ],
)  # fmt: skip
def test_older_command_lines(command, expected):
    settings, warnings = load(*command.split())
    (run,) = settings.runs()
    assert {name: getattr(run, name) for name in expected} == expected
    assert not warnings
    assert settings.folder == Path("results", f"non_convergence_{run.method}_{run.optimizer}")


def test_warns_of_what_has_no_effect():
    _, warnings = load(*"--type 1 --T 50 --rand_ratio 0.3 --grad_accumulation 4".split())
    assert warnings == ["without effect for full: --T, --rand_ratio, --grad_accumulation"]


@pytest.mark.parametrize(
    ("argv", "problems"),
    [
        (
            "--type 5 --optimizer adam --seed 1,1 --lr 0 --epoch 1.5 --turns 3",
            ["unknown flag --turns", "--type must be of 0 galore, 1 full, 2 golore, 3 large_batch, got '5'",
             "--optimizer must be SGD, AdamW or both, got 'adam'", "--seed must be one or more different values",
             "--lr must be greater than 0, got '0'", "--epoch must be an integer, got '1.5'"],
        ),
        ("--seeds 1,99999999999999999999", ["--seeds must be at most 9223372036854775807"]),
        ("--rank 10 --grad_accumulation 1", ["--rank 10 must be below --n 10", "--grad_accumulation 1 makes"]),
        (f"--output_dir {__file__}/below", [f"--output_dir {__file__}/below: {__file__} is not a folder"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_go(argv, problems):
    with pytest.raises(ConfigError) as caught:
        load(*argv.split())
    assert len(caught.value.problems) == len(problems)
    for problem, expected in zip(caught.value.problems, problems, strict=True):
        assert problem.startswith(expected)


# What it writes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A short call with both inner optimizers, two methods and two seeds, after another one in the same folder."""
    folder = tmp_path_factory.mktemp("non_convergence") / "results"
    flags = ["--output_dir", str(folder), "--steps", "300", "--lr", "0.01", "--sample_every", "80"]
    earlier, _ = load(*flags, "--type", "2", "--optimizer", "SGD")
    report.start(earlier)
    report.write_run(folder, descent.descend(earlier.runs()[0]))
    assert (folder / "sgd_golore_seed42.csv").is_file()
    (folder / "notes.txt").write_text("kept")
    assert non_convergence.main([*flags, "--type", "0,1", "--seeds", "42,1"]) == 0
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_of_a_call(results):
    names = [f"{o}_{m}_seed{s}.csv" for o in ("sgd", "adamw") for m in ("galore", "full") for s in (42, 1)]
    expected = [*names, "settings.json", "summary.csv", "summary.md", "plot.png", "notes.txt"]
    assert sorted(path.name for path in results.iterdir()) == sorted(expected)
    assert (results / "plot.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((results / "settings.json").read_text())
    assert written["settings"]["seeds"] == [42, 1] and len(written["runs"]) == 8


def test_csv_has_the_trajectory_in_full_precision(results):
    (run,) = runs(*"--type 0 --optimizer AdamW --seed 1 --steps 300 --lr 0.01 --sample_every 80".split())
    samples = descent.descend(run).samples
    assert [sample.step for sample in samples] == [0, 80, 160, 240, 300]
    written = read(results / "adamw_galore_seed1.csv")
    assert [(int(row["step"]), float(row["objective"]), float(row["gap"])) for row in written] == [
        (sample.step, sample.objective, sample.gap) for sample in samples
    ]


def test_summary(results):
    rows = read(results / "summary.csv")
    assert len(rows) == 8 and tuple(rows[0]) == report.SUMMARY_COLUMNS
    for row in rows:
        trajectory = read(results / f"{row['optimizer']}_{row['method']}_seed{row['seed']}.csv")
        assert (row["gap_start"], row["gap_end"]) == (trajectory[0]["gap"], trajectory[-1]["gap"])
        assert row["gap_late"] == trajectory[3]["gap"]  # step 240 is nearest to 225
    lines = (results / "summary.md").read_text().splitlines()
    assert len(lines) == 2 + 4
    ends = [float(row["gap_end"]) for row in rows if (row["optimizer"], row["method"]) == ("sgd", "full")]
    assert f"{sum(ends) / 2:.4f} ± {abs(ends[0] - ends[1]) / 2**0.5:.4f} ({ends[0]:.4f}, {ends[1]:.4f})" in lines[3]
    assert lines[3].startswith("| SGD | full gradient |") and lines[3].endswith("| falls | falls, as claimed |")


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([20.0, 9.0, 4.0, 2.3, 2.2], "stalls"),
        ([20.0, 9.0, 4.0, 2.3, 1.9], "falls"),
        ([20.0, 0.1, 0.1, 0.1, 0.1], "falls"),  # there is nothing left to lose
        ([20.0, 20.0, 20.0, 20.0, 21.0], "diverges"),
        ([20.0, 99.0, math.inf, math.inf, math.nan], "diverges"),
    ],
)
def test_trend(gaps, expected):
    assert report.trend(list(enumerate(gaps))) == expected


def test_a_claim_that_fails_is_named():
    row = {"optimizer": "sgd", "method": "galore", "gap_start": 20.0, "gap_late": 2.0, "claim": "stalls"}
    rows = [{**row, "gap_end": 2.0, "seen": "stalls"}, {**row, "gap_end": 1.0, "seen": "falls"}]
    assert report.table(rows).splitlines()[-1].endswith("| stalls | stalls (1), falls (1), NOT as claimed |")


def test_only_a_claim_s_own_settings_can_fail_it():
    row = {"optimizer": "sgd", "method": "galore", "gap_start": 20.0, "gap_late": 2.0, "claim": "stalls"}
    row |= {"gap_end": 1.0, "seen": "falls", "covered": False}
    line = report.table([row]).splitlines()[-1]
    assert line.endswith("| stalls | falls, which the claim does not cover: other settings |")
    assert "NOT as claimed" in report.table([{**row, "covered": True}])


@pytest.mark.parametrize(
    ("flags", "covered"),
    [
        ("", True),
        ("--seeds 3 --sample_every 10 --T 100 --epoch 200000", True),
        *[(flags, False) for flags in ("--steps 4000", "--lr 1e-3", "--T 50", "--n 12", "--rank 3", "--sigma 2")],
        ("--type 2 --rand_ratio 0.5 --optimizer SGD", False),
        ("--type 3 --grad_accumulation 10", False),
    ],
)
def test_what_a_claim_covers(flags, covered):
    assert all(report.is_covered(run) == covered for run in runs(*flags.split()))


def test_a_run_that_diverged_has_a_line():
    row = {"optimizer": "sgd", "method": "galore", "gap_start": 20.0, "gap_late": 1e308, "claim": "stalls"}
    rows = [{**row, "gap_end": gap, "seen": "diverges"} for gap in (math.inf, math.nan)]
    assert "| 20.0000 ± 0.0000 | 1e+308 | inf (inf, nan) |" in report.table(rows)


@pytest.mark.parametrize(
    "files", ["[", "[]", '{"files": 3}', '{"files": [3, "../kept", "/kept", "notes.txt", "kept"]}']
)
def test_nothing_but_results_is_removed(tmp_path, files):
    folder = tmp_path / "results"
    folder.mkdir()
    kept = [tmp_path / "kept", folder / "kept", folder / "notes.txt"]
    for path in kept:
        path.write_text("kept")
    (folder / "settings.json").write_text(files)
    report.start(load("--type", "1", "--output_dir", str(folder))[0])
    assert all(path.exists() for path in kept)


def test_a_failed_run_ends_the_call(tmp_path, monkeypatch):
    settings, _ = load("--type", "1", "--optimizer", "SGD", "--output_dir", str(tmp_path))
    monkeypatch.setattr(non_convergence, "_follow", math.sqrt)  # which no run goes through
    with pytest.raises(TypeError):
        list(non_convergence.follow_all(settings))


# The commands as they are given


def test_command_refuses_bad_input_with_exit_code_2(tmp_path):
    script = helpers.PROJECT / "experiments" / "non_convergence.py"
    command = [sys.executable, str(script), "--rank", "12", "--T", "-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [
        "error: --T must be an integer of at least 0, got '-1'",
        "error: --rank 12 must be below --n 10: nothing would be left to minimise",
    ]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_script_prints_the_command(tmp_path):
    command = [
        "bash",
        str(helpers.PROJECT / "scripts" / "non_convergence.sh"),
        "--jobs",
        "4",
        "--dry_run",
        "--output_dir",
        "my results",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    expected = ".venv/bin/python experiments/non_convergence.py --seeds 42\\,1\\,2 --jobs 4 --output_dir my\\ results "
    assert done.stdout == expected + "\n"
