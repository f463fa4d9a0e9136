"""The benchmarks that build a run: they run, so that whoever wants to compare can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_blocks

PROJECT = Path(__file__).resolve().parents[1]
TINY = "--model_config configs/llama_tiny.json --updates 1 --batch_size 2 --max_length 32"


def run_benchmark(arguments: str, out: Path) -> dict:
    command = [sys.executable, *arguments.split(), "--json", str(out)]
    subprocess.run(command, cwd=PROJECT, check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(out.read_text())


@pytest.mark.slow
def test_throughput_compares_runs_and_a_bare_loop(tmp_path):
    out = tmp_path / "out.json"
    result = run_benchmark(f"benchmarks/throughput.py {TINY} --turns 1 --run full_rank --run lora --layers 1", out)
    assert [row["run"] for row in result["rows"]] == ["full_rank", "lora", "bare loop, fused AdamW"]
    assert all(row["tokens_per_second"] > 0 for row in result["rows"]) and result["layers"] == 1


@pytest.mark.slow
def test_the_throughput_of_a_study_is_of_each_method(tmp_path):
    write_blocks(tmp_path / "data")
    command = f"benchmarks/study_throughput.py configs/studies/quickstart.yaml --dataset_path {tmp_path / 'data'}"
    speeds = run_benchmark(f"{command} --methods muon,relora --turns 1 --updates 1 --warm 1", tmp_path / "out.json")
    assert list(speeds) == ["muon", "relora"] and all(speed > 0 for speed in speeds.values())


@pytest.mark.slow
def test_save_measures_both_ways(tmp_path):
    assert run_benchmark(f"benchmarks/save.py {TINY} --rounds 1", tmp_path / "out.json")


@pytest.mark.slow
def test_start_measures_what_is_drawn():
    command = "benchmarks/start.py --model_config configs/llama_tiny.json --rank 4 --threads 1 2"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=PROJECT, check=True, timeout=240, capture_output=True, text=True
    )
    assert [line.count("numbers/s") for line in done.stdout.splitlines()] == [0, 1, 1, 1, 1]


@pytest.mark.slow
def test_building_tells_its_memory():
    command = "benchmarks/build_memory.py --model_config configs/llama_tiny.json --rank 8 lora lora,quantize=8bit"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=PROJECT,
        check=True,
        timeout=240,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "lora,quantize=8bit, 1 x ddp:" in done.stdout, done.stdout


@pytest.mark.slow
def test_reading_blocks_is_measured_for_both_sizes(tmp_path):
    rows = run_benchmark("benchmarks/read_blocks.py --rows 500 --length 64 --turns 1", tmp_path / "out.json")
    assert [row["bytes"] for row in rows] == [4, 2] and all(row["rows_per_second"][0] > 0 for row in rows)
    assert rows[1]["disk"] < 0.6 * rows[0]["disk"]


@pytest.mark.slow
def test_a_document_mask_is_measured_in_three_ways():
    command = "benchmarks/document_mask.py --model_config configs/llama_tiny.json --tokens 64 --rounds 2"
    done = subprocess.run([sys.executable, *command.split()], cwd=PROJECT, check=True, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["256", "64"], ["2048", "64"]]
    assert all(int(rate.replace(",", "")) > 0 for row in rows for rate in row[2:])


@pytest.mark.slow
def test_precision_trains_in_each(tmp_path):
    (tmp_path / "text.txt").write_text("a town, a river and a hill; " * 400)
    command = (
        f"benchmarks/precision.py {tmp_path / 'text.txt'} --out {tmp_path / 'out'} --updates 3 --hidden 32 --layers 1"
    )
    subprocess.run(
        [
            sys.executable,
            *command.split(),
            "--length",
            "32",
            "--precisions",
            "bf16/published",
            "--methods",
            "galore",
            "--seeds",
            "0",
        ],
        cwd=PROJECT,
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert list((tmp_path / "out").rglob("metrics.jsonl"))
