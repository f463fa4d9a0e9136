"""How a `Trainer` of this project saves and loads: complete checkpoints of finite weights, or none."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer

from peft_pretraining.data.json_rows import one_line
from peft_pretraining.finetune.checkpoints import (
    PREFIX,
    CheckpointUnusable,
    is_sealed,
    keep_newest,
    numbered,
    seal,
)
from peft_pretraining.finetune.entry import RunFailed
from peft_pretraining.finetune.identity import settings_of, write_settings
from peft_pretraining.finetune.loading import not_finite
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.flags import ConfigError
from peft_pretraining.training.tracking import log


class CheckpointingTrainer(Trainer):
    """A `Trainer` whose checkpoints are sealed, counted and loaded as checkpoints.py says.

    `RunFailed` where a run cannot go on, `CheckpointUnusable` where a checkpoint cannot be loaded.
    """

    model: PreTrainedModel

    def __init__(self, finetuning: FineTuning, **arguments: Any):
        super().__init__(args=finetuning.training, **arguments)
        self._finetuning = finetuning
        self._settings: dict[str, Any] | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A complete checkpoint, or none where the weights are not finite; then older ones beyond the limit go."""
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX}{self.state.global_step}"
        if (name := not_finite(self.model)) is not None:
            log.error("no checkpoint after update %d: %s is not finite", self.state.global_step, name)
            return
        if self.args.should_save:
            _remove(folder)
        self._wait_for_all()
        # The base class would delete an older checkpoint before this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self._wait_for_all()  # each process writes its own random state
            if self.args.should_save:
                self._settings = self._settings or settings_of(self._finetuning)
                write_settings(folder, self._settings)
                seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # of files, of torch.save, and of safetensors
            raise RunFailed(f"{folder} cannot be written ({one_line(error)}); {self.where_to_go_on()}") from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            keep_newest(folder.parent, limit, self.state.best_model_checkpoint)

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    def where_to_go_on(self) -> str:
        """The end of a message: the checkpoint with which the same command goes on."""
        complete = [path for _, path in numbered(self._finetuning.output_dir) if is_sealed(path)]
        return f"the newest good checkpoint is {complete[0]}" if complete else "there is no checkpoint to go back to"

    def check_finite(self) -> None:
        """Raise `RunFailed` where the weights are not finite."""
        if (name := not_finite(self.model)) is not None:
            raise RunFailed(
                f"{name} is not finite after update {self.state.global_step}: nothing is saved or reported; "
                f"{self.where_to_go_on()} (a lower --learning_rate may help)"
            )

    # Loading.

    def _load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        """The weights of a checkpoint, into the model that is trained."""
        super()._load_from_checkpoint(checkpoint, model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading():
            self._load_weights(resume_from_checkpoint, model)
            if (name := not_finite(self.model)) is not None:
                raise CheckpointUnusable(f"{name} is not finite")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading():
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading():
            super()._load_scaler(checkpoint)

    def _load_best_model(self) -> None:
        try:
            with reading():
                self._load_best_weights()
        except CheckpointUnusable as error:
            raise RunFailed(f"the best model, {self.state.best_model_checkpoint}, cannot be loaded: {error}") from error

    def _load_best_weights(self) -> None:
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint that lacks weights is none; those of one tensor under several names are saved once."""
        state, missing = self.model.state_dict(), set(load_result.missing_keys)
        found = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        lacking = sorted(name for name in missing if state[name].data_ptr() not in found)
        if names := lacking or sorted(load_result.unexpected_keys):
            told = "lacks" if lacking else "has, beside the model's weights,"
            raise CheckpointUnusable(f"it {told} {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}")

    def _init_training_state(self, *arguments: Any, **keywords: Any) -> tuple[int, int]:
        """The best model's checkpoint is looked for beside the others: the folder may have been moved."""
        found = super()._init_training_state(*arguments, **keywords)
        if self.state.global_step and self.state.best_global_step:
            best = self._finetuning.output_dir / f"{PREFIX}{self.state.best_global_step}"
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
        return found

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing, where all updates are done: the base class would make one more."""
        if self.state.global_step >= self.state.max_steps:
            log.info("all %d updates are done", self.state.max_steps)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **keywords)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Whatever fails while a checkpoint is loaded becomes `CheckpointUnusable`."""
    try:
        yield
    except (ConfigError, CheckpointUnusable):
        raise
    except Exception as error:  # files of others: torch, safetensors, json and the optimizers raise all kinds
        why, kind = one_line(error), type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's text recommends to load it without care
            why = "a file holds more than tensors, or is damaged"
        raise CheckpointUnusable(why if why == kind else f"{why} ({kind})") from error


def _remove(path: Path) -> None:
    """What an earlier attempt left, of any kind."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
