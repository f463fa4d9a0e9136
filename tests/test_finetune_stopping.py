"""Asking a fine-tuning to stop: it saves, exits with 75, and the same command ends with an undisturbed one's bits."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from finetune_helpers import glue_flags, rows, run_glue, write_bert, write_rows
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

import run_glue as script
from peft_pretraining.finetune.stopping import StopOnRequest, shielded
from peft_pretraining.finetune.trainer import MethodTrainer
from peft_pretraining.runtime.signals import Stopped

ALL = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Six updates in two epochs, galore with a refresh at every other one, dropout on."""
    folder = tmp_path_factory.mktemp("stopping")
    return {
        **{"model_name_or_path": write_bert(folder / "bert"), "task_name": "sst2", "method": "galore", "rank": 4},
        **{"train_file": write_rows(folder / "train.jsonl", rows("sst2", 12, seed=1)), "update_proj_gap": 2},
        **{"validation_file": write_rows(folder / "validation.jsonl", rows("sst2", 8, seed=2)), "max_length": 24},
        **{"do_train": True, "do_eval": True, "num_train_epochs": 2, "max_steps": None, "eval_strategy": "epoch"},
        **{"per_device_train_batch_size": 4, "save_strategy": "epoch", "disable_tqdm": True, "logging_steps": 1},
        **{"use_cpu": True, "learning_rate": 5e-3},
    }


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    return folder, run_glue(**flags, output_dir=folder)


def signal_in(monkeypatch, method: str, call: int, number: int) -> None:
    """A signal to this process in a trainer's `call`-th call of a method."""
    original, calls = getattr(MethodTrainer, method), []

    def wrapped(self, *args, **keywords):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *args, **keywords)

    monkeypatch.setattr(MethodTrainer, method, wrapped)


def stopped(argv: list[str]) -> None:
    before = [signal.getsignal(number) for number in ALL]
    assert script.main(argv) == 75
    assert [signal.getsignal(number) for number in ALL] == before


def assert_same(folder, whole, results):
    one, other = load_file(folder / "model.safetensors"), load_file(whole[0] / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for name in ("train_steps", "eval_accuracy", "eval_loss"):
        assert results[name] == whole[1][name]


@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_a_signal_in_an_update_saves_it(number, flags, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        signal_in(patch, "training_step", 2, number)
        stopped(glue_flags(**flags, output_dir=out))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2"]  # in the middle of an epoch
    assert not (out / "all_results.json").exists() and not (out / "model.safetensors").exists()
    assert_same(out, undisturbed, run_glue(**flags, output_dir=out))


def test_a_signal_in_an_evaluation_within_the_training(flags, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        signal_in(patch, "evaluate", 1, signal.SIGTERM)
        stopped(glue_flags(**flags, output_dir=out))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3"]
    assert_same(out, undisturbed, run_glue(**flags, output_dir=out))


def test_a_request_after_the_training_ends_the_evaluation():
    """There is nothing left to save then."""
    callback, arguments = StopOnRequest(), SimpleNamespace(world_size=1)
    callback.on_prediction_step(arguments, None, None)
    callback._request.received = True
    with pytest.raises(Stopped):
        callback.on_prediction_step(arguments, None, None)


class Answers(Dataset):
    """What this process does about each signal."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[bool]:
        return [signal.getsignal(number) is signal.SIG_IGN for number in ALL]


def test_workers_leave_signals_to_the_training():
    """A signal to the whole process group must not end the workers: that would be an error of the run."""
    begun = []
    loader = DataLoader(Answers(), num_workers=1, batch_size=None, worker_init_fn=begun.append)
    assert list(shielded(loader)) == [[True] * len(ALL)]
