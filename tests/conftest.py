"""Small real data and models that most tests share."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of several processes starve each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup: the scripts that tests start would ignore it, too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Coverage is measured in the processes that run the tests, not in those that tests start: these would import torch, a
# third of their time, under the tracer.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)

from pathlib import Path

import gpu_tier
import numpy as np
import pytest
import report_helpers
import slow_tier


def pytest_addoption(parser):
    parser.addoption("--fuzz", metavar="N", help="N times as many examples in test_fuzz.py, other ones every time")


def pytest_configure(config):
    if times := config.getoption("--fuzz"):
        os.environ["FUZZ"] = times  # test_fuzz.py reads it as it is imported
    if not gpu_tier.asked_for(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is the same on every machine
    elif not gpu_tier.found():
        raise pytest.UsageError("-m gpu: torch finds no CUDA device that it can use")


VOCABULARY = 128
BLOCK = 64


_repeated: set[str] = set()


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_tier.choose(config, items)
    slow_tier.sort_into_tiers(items, whole_files=not any("::" in argument for argument in config.args))
    _repeated.update(slow_tier.repeated(items))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measure coverage in the first case of each test alone: the tracer makes tests half as long again."""
    measured = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
    if measured is None or item.nodeid not in _repeated:
        return (yield)
    measured.stop()
    try:
        return (yield)
    finally:
        measured.start()


def write_blocks(
    folder: Path, train: int = 200, validation: int = 20, block: int = BLOCK, vocabulary: int = VOCABULARY, **args
) -> Path:
    """A folder as `pretokenize.py` writes it: random walks over a small vocabulary, which a model learns quickly."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    rng = np.random.default_rng(0)

    def split(rows: int) -> Dataset:
        walk = np.cumsum(rng.integers(0, 3, (rows, block)), axis=1) + rng.integers(0, vocabulary, (rows, 1))
        features = Features({"input_ids": List(Value("int32"), length=block)})
        return Dataset.from_dict({"input_ids": (walk % vocabulary).tolist()}, features=features)

    DatasetDict({"train": split(train), "validation": split(validation)}).save_to_disk(str(folder))
    described = {"sequence_length": block, "vocab_size": vocabulary, "largest_token_id": vocabulary - 1, **args}
    (folder / "args.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def write_model(path: Path, **changes) -> Path:
    """The JSON of a LLaMA with 30,000 weights."""
    shape = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY},
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "initializer_range": 0.02},
    }
    path.write_text(json.dumps({**shape, **changes}))
    return path


@pytest.fixture(scope="session")
def device() -> str:
    """Where a test computes: "cpu", or with `-m gpu` "cuda", where runs compute by themselves. See gpu_tier.py."""
    return gpu_tier.DEVICE


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    return write_blocks(tmp_path_factory.mktemp("blocks") / "data")


@pytest.fixture(scope="session")
def model_json(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama.json")


@pytest.fixture(scope="session")
def small_study(tmp_path_factory, data_dir, model_json) -> Path:
    """Runs of 6 updates of full rank and GaLore: see `report_helpers.make_runs`. Not to be changed."""
    return report_helpers.make_runs(tmp_path_factory.mktemp("study"), data_dir, model_json)


@pytest.fixture
def command(data_dir, model_json, tmp_path):
    """A function that gives the command line of a small run in `tmp_path / "run"`; keywords add or change flags."""

    def build(**changes) -> list[str]:
        settings = {
            **{"model_config": model_json, "dataset_path": data_dir, "save_dir": tmp_path / "run"},
            **{"batch_size": 4, "total_batch_size": 8, "lr": 1e-2, "num_training_steps": 20, "warmup_steps": 2},
            **{"eval_every": 10, "save_every": 10, "workers": 0},
            **changes,
        }
        return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]

    return build


@pytest.fixture
def caplog(caplog):
    """pytest's, which hears the package's log even where a run before has taken that to stderr alone."""
    log = logging.getLogger("peft_pretraining")
    before, log.propagate = log.propagate, True
    yield caplog
    log.propagate = before


@pytest.fixture
def trainings(monkeypatch):
    """Runs of studies and sweeps leave what they are told to, instead of training."""
    from study_helpers import Trainings, sweep

    def stand_in(**settings):
        made = Trainings(**settings)
        monkeypatch.setattr(sweep.subprocess, "run", made)
        return made

    return stand_in


@pytest.fixture
def run_study(tmp_path, monkeypatch, capsys):
    """scripts/study.py on the text of a study's file, without its plots, which take seconds."""
    import study_helpers

    for name in ("plot_rates", "plot_memory"):
        monkeypatch.setattr(study_helpers.plots, name, lambda *_: None)

    def run(text=study_helpers.STUDY, *more, **inputs):
        (tmp_path / "study.yaml").write_text(text)
        argv = ["study.py", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
        for name, value in (inputs or {"dataset_path": "data"}).items():
            argv += [f"--{name}", str(value)]
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        code = study_helpers.study.main()
        return code, capsys.readouterr()

    return run
