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
    header, ruler, *lines = capsys.readouterr().out.splitlines()
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


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert compare.main([str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
