"""The comparison of runs."""

import json

import pytest

import torchrun_main
from peft_pretraining.report import compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir, model_json):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("full_rank", "galore"):
        settings = {
            **{"model_config": model_json, "dataset_path": data_dir, "save_dir": folder / method, "method": method},
            **{"batch_size": 4, "lr": 1e-2, "num_training_steps": 6, "warmup_steps": 1, "eval_every": 3, "workers": 0},
            **({"rank": 4} if method == "galore" else {}),
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        assert torchrun_main.main(flags) == 0
    return folder


def test_table_and_plot(runs, tmp_path, capsys):
    plot, rows = tmp_path / "plots" / "comparison.png", tmp_path / "rows.json"
    arguments = [str(runs / "full_rank"), str(runs / "galore"), "--plot", str(plot), "--json", str(rows)]
    assert compare.main(arguments) == 0
    printed = capsys.readouterr().out
    header, ruler, *lines = printed.partition("\n\n")[0].splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == list(compare.COLUMNS)
    assert len({len(line) for line in (header, ruler, *lines)}) == 1
    assert [line.split("|")[1].strip() for line in lines] == ["full_rank", "galore"]
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    full_rank, galore = json.loads(rows.read_text())
    assert full_rank["perplexity before"] == galore["perplexity before"]  # the same initial weights
    assert full_rank["validation perplexity"] < full_rank["perplexity before"]

    weights = 2 * 128 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64) + 5 * 32
    assert full_rank["optimizer-state MB"] == pytest.approx((2 * weights * 4 + 4 * 21) / 1e6)
    assert galore["optimizer-state MB"] < 0.75 * full_rank["optimizer-state MB"]

    tables = "embedding 4.1k, head 4.1k, norms 160"
    assert printed.partition("\n\n")[2].splitlines() == [
        "parameter groups, with peak rates:",
        f"  full_rank: matrices 20.5k, {tables}: adamw, rate 0.01, weight decay 0",
        f"  galore: {tables}: adamw, rate 0.01, weight decay 0",
        "  galore: matrices 20.5k: adamw in rank 4, rate 0.01, weight decay 0",
    ]
    matrices = {"weights": {"matrices": 20480}, "rule": "adamw", "rank": 4, "lift": None}
    assert galore["parameter groups"][1] == {**matrices, "rate": 0.01, "weight_decay": 0.0}


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert compare.main([str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def metrics(*lines) -> bytes:
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


UPDATE = {"update_step": 1, "loss": 5.0, "tokens_seen": 512, "throughput_tokens": 100.0, "step_time": 2.0}
EVALUATION = {"update_step": 1, "tokens_seen": 512, "final_eval_loss": 4.0, "final_eval_perplexity": 54.6}
EVALUATION |= {"optimizer_state_bytes": 4_000_000}


@pytest.fixture
def folder(tmp_path):
    def write(content: bytes, name="one", config="settings: {method: galore}\n"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config)
        (tmp_path / name / "metrics.jsonl").write_bytes(content)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("content", "cells", "said"),
    [
        ((UPDATE, EVALUATION, b'{"update_step": 2, "lo'), "54.60|4.00|100|2", "1 line(s): line 3 is cut off"),
        ((UPDATE, b"\xff\n", b"[]\n", EVALUATION), "54.60|4.00|100|2", "2 line(s): line 2 is not UTF-8;"),
        ((b'{"update_step": 1, "loss": NaN}\n', EVALUATION), "54.60|4.00|0|0", None),
        ((UPDATE, {**EVALUATION, "final_eval_loss": None, "final_eval_perplexity": None}), "—|4.00|100|2", None),
        ((UPDATE, {"update_step": 1, "final_eval_loss": "x", "tokens_seen": []}), "—|—|100|2", None),
        (({"update_step": 1, "loss": {}, "step_time": 1e400}, EVALUATION), "54.60|4.00|0|0", None),
    ],
    ids=range(6),
)  # fmt: skip
def test_metrics_of_any_content_are_compared(folder, tmp_path, capsys, content, cells, said):
    plot, rows = tmp_path / "plot.png", tmp_path / "rows.json"
    assert compare.main([folder(metrics(*content)), "--plot", str(plot), "--json", str(rows)]) == 0
    captured = capsys.readouterr()
    assert [cell.strip() for cell in captured.out.partition("\n\n")[0].splitlines()[-1].strip("| ").split("|")][
        1:
    ] == cells.split("|")
    assert (said in captured.err and captured.err.count("\n") == 1) if said else captured.err == ""
    assert json.loads(rows.read_text(), parse_constant=pytest.fail) and plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("settings: [1", "cannot be used: while parsing a flow sequence"),
        ("", "config.yaml is missing or empty"),
        ("[]", "cannot be used: must be a mapping of names to values"),
        ("settings: {rank: 4}", "cannot be used: it names no method"),
        ("settings: {method: [a]}", "cannot be used: it names no method"),
        ("settings: {method: a, method: b}", "cannot be used: key 'method' is given twice"),
        ("settings: !!python/object:os.system x", "cannot be used: line 1: the tag tag:yaml.org,2002:python/object"),
    ],
)
def test_an_unusable_configuration_is_refused_in_one_line(folder, capsys, config, reason):
    assert compare.main([folder(metrics(UPDATE, EVALUATION), config=config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


@pytest.mark.parametrize("groups", ["", "parameter_groups: 5\n", "parameter_groups: [{weights: {norms: 1}}]\n"])
def test_groups_of_an_older_run_are_not_made_up(folder, capsys, groups):
    assert compare.main([folder(metrics(UPDATE, EVALUATION), config=f"settings: {{method: galore}}\n{groups}")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  galore: not recorded"


def test_all_unusable_folders_are_named(folder, tmp_path, capsys):
    good, unevaluated = folder(metrics(EVALUATION)), folder(metrics(UPDATE), "two")
    (tmp_path / "empty").mkdir()
    assert compare.main([good, unevaluated, str(tmp_path / "empty"), str(tmp_path / "missing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 3
    assert "two has not been evaluated yet" in captured.err


def test_runs_of_one_method_are_told_apart(folder, capsys):
    one, two, again = (folder(metrics(EVALUATION), name) for name in ("one", "$two", "again"))
    other = folder(metrics(EVALUATION), "other", "settings: {method: lora}")
    assert compare.main([one, two, other, again, again]) == 0
    first_cells = [line.split("|")[1].strip() for line in capsys.readouterr().out.partition("\n\n")[0].splitlines()[2:]]
    expected = ["galore (one)", "galore ($two)", "lora", "galore (again) 1", "galore (again) 2"]
    assert first_cells == expected


def test_runs_of_one_method_are_named_by_what_differs(folder, capsys):
    told = (
        "settings: {method: galore, lr: 0.01, seed: 1, rank: 8}\n",
        "settings: {method: galore, lr: 0.02, seed: 2, rank: 8}\n",
    )
    one, two = (folder(metrics(EVALUATION), f"run{number}", text) for number, text in enumerate(told))
    assert compare.main([one, two]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["galore (run0, lr=0.01)", "galore (run1, lr=0.02)"]


def test_results_that_cannot_be_written_are_one_line(folder, tmp_path, capsys):
    one = folder(metrics(EVALUATION))
    for flags in (
        ["--json", str(tmp_path)],
        ["--plot", str(tmp_path / "plot.nonsense")],
        ["--plot", one + "/config.yaml/x"],
    ):
        assert compare.main([one, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: the results cannot be written: ")
