"""A run in this process, built as the trainer does, whose updates are made one by one; and whole runs in others."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.checkpoint.safe_loading import load_tensors
from peft_pretraining.config import cli
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.training import build as building
from peft_pretraining.training.deciding import settle
from peft_pretraining.training.loop import next_micro_batches, train_step
from peft_pretraining.training.progress import Update

from .children import Child
from .scene import Scene, argv

GIB, MIB = 2**30, 2**20


def settings_of(scene: Scene, model: str, folder: str, **changes: Any) -> dict[str, Any]:
    """Flags and values of a run on the check's data."""
    return {
        **{"model_config": scene.model(model), "dataset_path": scene.data, "save_dir": scene.folder / folder},
        **{"max_length": scene.length, "batch_size": scene.size(64, 4), "lr": 1e-3, "num_training_steps": 10_000},
        **{"warmup_steps": 0, "scheduler": "constant", "workers": 0, "eval_every": 10_000, "save_every": 10_000},
        **changes,
    }


class Trainee:
    """Use it as a context: at the end, what it held is free."""

    def __init__(self, settings: dict[str, Any], device: torch.device):
        self._settings, self._device = settings, device

    def __enter__(self) -> Trainee:
        self._stack = ExitStack()
        launch = cli.load(argv(self._settings), environ={})
        group = ProcessGroup(0, 1, 0, 1, self._device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.run = building.build(launch, group, self._stack)
        self._stop = StopRequest()
        return self

    def __exit__(self, *error: object) -> None:
        self.run.tracker.close(0)
        self.run.checkpointer.wait()
        del self.run
        self._stack.close()
        gc.collect()

    def update(self) -> Update:
        """One update, and all that is known of it, for which the host waits."""
        done = self.launch()
        update = settle(self.run) or done
        assert update is not None, "it is known at once, or late"
        return update

    def launch(self) -> Update | None:
        """One update as a run makes it: where its numbers are read late, those before it are known."""
        self.run.late.finished()
        return train_step(self.run, next_micro_batches(self.run), self._stop)

    def synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def effective_weights(self) -> dict[str, Tensor]:
        """What a checkpoint would export, on the CPU."""
        merged = self.run.method.merged_state_dict(self.run.model)
        return {name: weight.detach().cpu().clone() for name, weight in merged.items()}

    def watch(self) -> list[weakref.ref[Tensor]]:
        """Its weights and states, to see whether they are free afterwards."""
        state = [value for each in self.run.optimizer.state.values() for value in each.values()]
        return [weakref.ref(tensor) for tensor in (*self.run.model.parameters(), *state) if isinstance(tensor, Tensor)]


def alive(watched: list[weakref.ref[Tensor]]) -> int:
    """Bytes of those that are not free."""
    tensors = [tensor for each in watched if (tensor := each()) is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def whole_run(settings: dict[str, Any], log: Path, **environment: str) -> Child:
    """`torchrun_main.py` in a process of its own."""
    import torchrun_main
    from peft_pretraining.runtime.signals import run_script

    words = argv(settings)
    return Child.start(lambda: run_script(lambda: torchrun_main.main(words)), log, **environment)


def must_end(child: Child, seconds: float, code: int = 0) -> None:
    """Raises `RuntimeError` for a run that does not end in time, with that exit code."""
    if not child.wait(seconds):
        raise RuntimeError(f"a run did not end within {seconds:.0f} s: {child.last_words()}")
    if child.code != code:
        raise RuntimeError(f"a run ended with {child.code} instead of {code}: {child.last_words()}")


def must_all_end(children: Sequence[Child], seconds: float) -> None:
    """`must_end` of all; if one does not, the others are killed."""
    try:
        for child in children:
            must_end(child, seconds)
    finally:
        for child in children:
            child.kill()


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's training state."""
    import torch.distributed.checkpoint as dcp

    folder = checkpoint / "training_state"
    described = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in described.items()}
    load_tensors(tensors, folder, distributed=False)
    return tensors


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bits."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    both = one.keys() & other.keys()
    unequal = {name for name in both if not torch.equal(bits(one[name]), bits(other[name]))}
    return sorted(unequal | (one.keys() ^ other.keys()))


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of any two entries; infinite where names or shapes differ."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    found = [(one[name].double() - other[name].double()).abs().max() for name in one if one[name].numel()]
    return float(torch.stack(found).max())  # NaN, if one of them is
