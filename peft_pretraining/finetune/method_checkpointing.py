"""What a checkpoint of fine-tuning holds of the method, and its form of the weights.

`model.safetensors` is the plain merged model, which `from_pretrained` loads. Beside what transformers writes there are
the method's small numbers (`method_state.json`) and, for methods with factors, the weights as they are trained
(`training_weights.safetensors`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from peft_pretraining.config import Config, method_settings
from peft_pretraining.finetune.checkpointing import CheckpointingTrainer, reading
from peft_pretraining.finetune.checkpoints import METHOD_STATE, TRAINING_WEIGHTS
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods.base import TrainingMethod


def has_factors(method: type[TrainingMethod]) -> bool:
    """Whether a method trains the model in another form than it is exported."""
    return method.merged_state_dict is not TrainingMethod.merged_state_dict


class MethodCheckpointingTrainer(CheckpointingTrainer):
    """A `CheckpointingTrainer` that saves and restores a method."""

    method_config: Config
    """Complete, also of what follows from the model and the data; unset where nothing is trained."""

    def __init__(self, finetuning: FineTuning, **arguments: Any):
        super().__init__(finetuning, **arguments)
        self._method: TrainingMethod | None = None

    @property
    def method(self) -> TrainingMethod:
        """The method of a trainer that has rows to train on."""
        assert self._method is not None, "nothing is trained"
        return self._method

    @property
    def has_factors(self) -> bool:
        return self._method is not None and has_factors(type(self._method))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The merged model; in a checkpoint the weights in training, too."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and self.has_factors and self.args.should_save:
            save_model(self.model, str(Path(output_dir or self._finetuning.output_dir) / TRAINING_WEIGHTS))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is None and self.has_factors and self.args.should_save:
            state_dict = self.method.merged_state_dict(self.model)
        super()._save(output_dir, state_dict)

    def _load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        if not self._load_training_weights(checkpoint):
            super()._load_weights(checkpoint, model)

    def _load_best_weights(self) -> None:
        assert self.state.best_model_checkpoint is not None, "the base class looks"
        if not self._load_training_weights(self.state.best_model_checkpoint):
            super()._load_best_weights()

    def _load_training_weights(self, checkpoint: str) -> bool:
        """False for a method without factors, whose checkpoints hold nothing but the plain model."""
        if not self.has_factors:
            return False
        self._check_same_method(Path(checkpoint))
        load_model(self.model, Path(checkpoint) / TRAINING_WEIGHTS, device=str(self.args.device))
        return True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"identity": self._identity(), "state": self.method.state_dict()}
            (Path(output_dir) / METHOD_STATE).write_text(json.dumps(state, indent=2))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading():
            if checkpoint is not None:
                self._check_same_method(Path(checkpoint))
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.method.load_state_dict(json.loads((Path(checkpoint) / METHOD_STATE).read_text())["state"])

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues."""
        config = self.method_config
        return {**method_settings.identity(config), "num_training_steps": config.schedule.num_training_steps}

    def _check_same_method(self, checkpoint: Path) -> None:
        file = checkpoint / METHOD_STATE
        if not file.is_file():
            if self.args.save_only_model:
                return
            raise ConfigError([f"--resume_from_checkpoint {checkpoint}: it has no {METHOD_STATE}"])
        saved = json.loads(file.read_text())["identity"]
        if problems := [
            f"{checkpoint} was begun with {name} {saved[name]!r} instead of {value!r} (--overwrite_output_dir "
            "starts over)"
            for name, value in self._identity().items()
            if name in saved and saved[name] != value
        ]:
            raise ConfigError(problems)
