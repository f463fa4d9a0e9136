"""Being asked to stop, for transformers' `Trainer`: finish the update, save a checkpoint, exit with 75.

The signals are those of `signals.py`. In training the checkpoint after the update is the last thing that is done:
evaluations that are due at it are made before, and nothing that would be of the end of an epoch or of the training. In
the evaluations and predictions after the training there is nothing to save.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from peft_pretraining.data.blocks import leave_signals_to_the_parent
from peft_pretraining.distributed import mean_over_processes
from peft_pretraining.runtime.signals import Stopped, StopRequest, is_script
from peft_pretraining.training.tracking import log


class StopOnRequest(TrainerCallback):
    """Ends the training, with `Stopped`, when any process was asked to stop. It must be the last callback."""

    def __init__(self) -> None:
        self._request = StopRequest()
        self._training = self._leaving = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._request.__enter__()
        self._training = True
        if self._asked(args):  # under an earlier one of several seeds
            self._leave("asked to stop: nothing of this training is begun")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._asked(args):
            control.should_save = True
            self._leaving = state.global_step < state.max_steps

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._training:
            self.on_step_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._leaving:
            mean_over_processes(torch.zeros(1, device=args.device))  # the main process has written its files
            self._leave(f"asked to stop: saved update {state.global_step}; launch the same command again to go on")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._training = False
        if not is_script():
            self._request.__exit__()

    def on_prediction_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if not self._training and self._asked(args):
            self._leave("asked to stop: the training is done; launch the same command again for its results")

    def _asked(self, args: TrainingArguments) -> bool:
        """Whether any process was; the answer is the same on all."""
        if args.world_size == 1:
            return self._request.received
        asked = torch.tensor(float(self._request.received), device=args.device)
        return bool(mean_over_processes(asked) > 0)

    def _leave(self, message: str) -> None:
        log.info(message)
        self._request.__exit__()
        raise Stopped


def shielded(loader: DataLoader) -> DataLoader:
    """The loader, whose workers leave signals to the training process: their deaths would be errors of the run."""
    loader.worker_init_fn = functools.partial(_begin_worker, loader.worker_init_fn)
    return loader


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    leave_signals_to_the_parent(worker)
    if begin is not None:
        begin(worker)
