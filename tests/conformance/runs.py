"""Tiny runs of any method with any of its update rules, each made once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from conftest import write_blocks, write_model

from peft_pretraining.flags import MethodSpec
from peft_pretraining.flags.settings import shown_default
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.rule_settings import RULES

UPDATES = 8
TOTAL_BATCH = 8
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 16}
VOCABULARY = 32
BASE = {
    **{"total_batch_size": TOTAL_BATCH, "batch_size": TOTAL_BATCH, "num_training_steps": UPDATES, "warmup_steps": 1},
    **{"lr": 0.01, "eval_every": UPDATES, "save_every": UPDATES, "workers": 0, "dtype": "float64"},
}


@dataclass(frozen=True)
class Case:
    """A method with one of its update rules."""

    method: str
    rule: str

    @property
    def spec(self):
        return METHODS[self.method]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of a tiny run."""
        return {"method": self.method, "optimizer": self.rule, **RULES[self.rule].tiny, **self.spec.tiny}

    @property
    def is_first(self) -> bool:
        """Whether it stands for its method in the fast tier."""
        return self.rule == self.spec.update_rules[0]

    @property
    def is_representative(self) -> bool:
        """Whether its method stands for others in the fast tier: the first of its family to be published that declares
        these permissions, and has the tables that it has."""
        alike = (spec for spec in METHODS.values() if _kind(spec) == _kind(self.spec))
        return self.spec is next(alike)

    def __str__(self) -> str:
        return self.method if self.is_first else f"{self.method}-{self.rule}"


def _kind(spec: MethodSpec) -> tuple[Any, ...]:
    return spec.family, spec.allows, spec.tables


CASES = [Case(spec.name, rule) for spec in METHODS.values() for rule in spec.update_rules]


def each_case(cases: Iterable[Case] = CASES):
    """Runs a test for every case; all but the first of each method are slow (and methods that are no representatives:
    see conftest.py)."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=str(case), marks=() if case.is_first else pytest.mark.slow) for case in cases]
    )


def allowing(permission: str) -> list[Case]:
    """Cases of the methods that declare a permission of `Allows`."""
    return [case for case in CASES if getattr(case.spec.allows, permission)]


@dataclass
class Outcome:
    """What a run in this process left."""

    folder: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        return self.folder / f"model_{helpers.checkpoints(self.folder)[-1]}"

    @property
    def losses(self) -> list[float]:
        """Of validation."""
        return [loss for _, loss in helpers.evaluations(self.folder)]


def inside_backward(case: Case) -> dict[str, Any]:
    """Settings with which per-layer updates are ordinary ones: a clip would be of each layer by its own norm, and the
    first bases would come from the first micro-batch alone."""
    return {"clip_grad_norm": 0, **({"stagger_refresh": False} if "stagger_refresh" in case.spec.own else {})}


class Runs:
    """Makes runs in a folder: `runs(case, **changes)`, each once."""

    def __init__(self, folder: Path):
        self.folder, self._done = folder, {}
        self._data = write_blocks(folder / "data", train=256, validation=8, block=16, vocabulary=VOCABULARY)
        self._models: dict[tuple[int, int], Path] = {}

    def command(self, case: Case, save_dir: Path, hidden: int = SHAPE["hidden_size"], **changes: Any) -> list[str]:
        settings = {
            **{"model_config": self._model(hidden), "dataset_path": self._data, "save_dir": save_dir},
            **{**BASE, **case.settings, **changes},
        }
        return [str(part) for name, value in settings.items() for part in (f"--{name}", shown_default(value))]

    def __call__(self, case: Case, again: int = 0, **changes: Any) -> Outcome:
        """`again` tells runs of the same settings apart."""
        key = (case, again, tuple(sorted(changes.items())))
        if key not in self._done:
            folder = self.folder / f"{len(self._done)} {case}"
            with observed() as seen:
                assert helpers.run(self.command(case, folder, **changes)) == 0
            self._done[key] = Outcome(folder, seen[0].model, seen[0].optimizer)
        return self._done[key]

    def _model(self, hidden: int) -> Path:
        path = self.folder / f"llama{hidden}.json"
        if not path.exists():
            shape = {**SHAPE, "hidden_size": hidden, "intermediate_size": 2 * hidden}
            write_model(path, vocab_size=VOCABULARY, **shape)
        return path


@contextlib.contextmanager
def observed() -> Iterator[list[Any]]:
    """The `Run` of each training in this process."""
    from peft_pretraining.training import build

    train, seen = build.train, []

    def observed_train(run):
        seen.append(run)
        return train(run)

    build.train = observed_train
    try:
        yield seen
    finally:
        build.train = train


def snapshot(run: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights and of the optimizer's state."""
    found = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    for name, param in run.model.named_parameters():
        for key, value in run.optimizer.state.get(param, {}).items():
            found[f"state.{name}.{key}"] = value
    return {name: value.detach().clone() for name, value in found.items()}


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that differ, by one bit or more; NaN equals NaN."""
    return sorted(
        name
        for name in {*one, *other}
        if name not in one or name not in other or not torch.equal(bits(one[name]), bits(other[name]))
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_weights(one: Path, other: Path, atol: float) -> None:
    """Of the training weights of two checkpoints."""
    ours, expected = (helpers.tensors(folder) for folder in (one, other))
    assert ours.keys() == expected.keys()
    for name in expected:
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], expected[name], atol=atol, rtol=0, msg=lambda text, n=name: n + text)


def assert_resumes(runs: Runs, case: Case, folder: Path, stop: int, **changes: Any) -> None:
    """A run that is stopped by a signal within update `stop` and launched again ends as one without, bit by bit."""
    argv = [*runs.command(case, folder, **changes), *helpers.RESUME]
    helpers.stop_after(stop, argv)
    assert helpers.checkpoints(folder) == [stop]
    assert helpers.run(argv) == 0
    helpers.assert_same_run(folder, runs(case, **changes).folder)


def rounding(optimizer: torch.optim.Optimizer) -> float:
    """How far apart the weights of float64 runs may come that add in another order: 1e-9, or what one rounding of the
    state changes, where that is kept in less than float64."""
    kept = [value.dtype for state in optimizer.state.values() for value in state.values() if value.ndim]
    return 1e-9 if all(not dtype.is_floating_point or dtype == torch.float64 for dtype in kept) else 1e-6
