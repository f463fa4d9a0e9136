"""transformers' `Trainer`, driving one of the training methods.

Data, schedule, evaluation, logging and checkpoints are the `Trainer`'s. A `TrainingMethod` (methods/base.py) changes
the model's layers, builds the optimizer and is called at the places of train.py's loop: before an update's first
forward pass, for the gradients' norm and their clipping, and around the optimizer's step.

A checkpoint folder holds the plain merged model, which `from_pretrained` loads, the optimizer's state, the method's
small numbers (`method_state.json`) and, for methods with factors, the weights as they are trained
(`training_weights.safetensors`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from peft_pretraining.config import Config
from peft_pretraining.distributed import mean_over_processes
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.finetune.stopping import StopOnRequest, shielded
from peft_pretraining.finetune.targets import target_modules
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.tracking import log
from peft_pretraining.train import state_bytes

METHOD_STATE = "method_state.json"
TRAINING_WEIGHTS = "training_weights.safetensors"


class MethodTrainer(Trainer):
    """A `Trainer` for a model that it converts itself; everything else is passed on.

    The method's settings are those of `finetuning`, completed by the layers that the model has and by the number of
    updates, which follows from the training data. Without training data nothing is converted.
    """

    def __init__(self, finetuning: FineTuning, model: PreTrainedModel, **arguments: Any):
        super().__init__(model=model, args=finetuning.training, **arguments)
        # Losses are means over a micro-batch. The default would be to trust that any model which takes further keywords
        # divides by the whole batch's targets itself; classifiers do not, and gradients would be too large.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_AroundTheStep(self))
        self.add_callback(StopOnRequest())
        self._micro_batch = 0
        self._skipped = False
        self.method: TrainingMethod | None = None
        if self.train_dataset is None:
            return
        config = finetuning.config
        if "target_modules" in METHODS[config.method.method].options:
            config = config.replace(target_modules=target_modules(model, finetuning))
        max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        self.method_config: Config = config.replace(num_training_steps=max_steps)
        self.method = load_method(config.method.method)(self.method_config)
        self.method.convert(self.model)

    def _get_dataloader(self, *arguments: Any, **keywords: Any) -> Any:
        return shielded(super()._get_dataloader(*arguments, **keywords))

    # The method's calls, in the order of train.py's `train_step`.

    def training_step(self, model: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
        if self._micro_batch == 0:
            self.method.before_forward(self.model, self.bare_optimizer, self.state.global_step)
        count = self.current_gradient_accumulation_steps
        self.method.before_micro_batch(self.model, self.bare_optimizer, self._micro_batch, count)
        self._micro_batch += 1
        return super().training_step(model, *arguments, **keywords)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._gradient_norm()
        factor = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if self._skipped:
            return norm
        self.method.scale_gradients(self.model, self.bare_optimizer, factor)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        return self._gradient_norm() if grad_norm is None else grad_norm

    def _gradient_norm(self) -> Tensor:
        """The method's norm of this update's gradients, which are complete and reduced; says whether to skip it."""
        self.accelerator.unscale_gradients()
        norm = self.method.grad_norm(self.model, self.bare_optimizer)
        self._skipped = not bool(norm.isfinite())
        return norm

    def before_optimizer_step(self) -> None:
        """The gradients are clipped. Without gradients, as after this for an update that is skipped, nothing moves."""
        self._micro_batch = 0
        if self._skipped:
            log.warning("skipped update %d: the gradient is not finite", self.state.global_step)
            self.bare_optimizer.zero_grad(set_to_none=True)
        else:
            self.method.before_optimizer_step(self.model, self.bare_optimizer, self.state.global_step)

    def after_optimizer_step(self) -> None:
        if not self._skipped:
            self.method.after_optimizer_step(self.model, self.bare_optimizer, self.state.global_step)

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """With the method's numbers beside the loss."""
        if self.method is not None and "loss" in logs:
            logs = {**logs, **self.method.metrics()}
        super().log(logs, *arguments, **keywords)

    # The optimizer.

    @property
    def bare_optimizer(self) -> Optimizer:
        """The method's own, without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The method's. As in transformers, `--weight_decay` spares biases and the weights of norms."""
        if self.optimizer is None:
            self.optimizer = self.method.build_optimizer(self.model)
            if self.args.weight_decay:
                _spare(self.optimizer, self.model, set(self.get_decay_parameter_names(self.model)))
        return self.optimizer

    def optimizer_report(self) -> dict[str, int]:
        """Bytes of the optimizer's state on this device, and numbers of weights: trained, and in all."""
        params = list(self.model.parameters())
        return {
            "optimizer_state_bytes": state_bytes(self.bare_optimizer),
            "trainable_parameters": sum(param.numel() for param in params if param.requires_grad),
            "parameters": sum(param.numel() for param in params),
        }

    # Checkpoints.

    @property
    def has_factors(self) -> bool:
        """Whether the model is trained in another form than it is exported."""
        return self.method is not None and type(self.method).convert is not TrainingMethod.convert

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The merged model; in a checkpoint the weights in training, too."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and self.has_factors and self.args.should_save:
            save_model(self.model, str(Path(output_dir or self.args.output_dir) / TRAINING_WEIGHTS))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is None and self.has_factors and self.args.should_save:
            state_dict = self.method.merged_state_dict(self.model)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_training_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_training_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

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
        if checkpoint is not None:
            self._check_same_method(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.method.load_state_dict(json.loads((Path(checkpoint) / METHOD_STATE).read_text())["state"])

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues."""
        config = self.method_config
        reads = METHODS[config.method.method].options
        return {
            "method": config.method.method,
            "optimizer": config.optimizer.optimizer,
            "rank": config.method.rank if "rank" in reads else None,
            "proj_type": config.method.proj_type if "proj_type" in reads else None,
            "target_modules": list(config.method.target_modules) if "target_modules" in reads else None,
            "num_training_steps": config.schedule.num_training_steps,
        }

    def _check_same_method(self, checkpoint: Path) -> None:
        file = checkpoint / METHOD_STATE
        if not file.is_file():
            if self.args.save_only_model:
                return
            raise ConfigError([f"--resume_from_checkpoint {checkpoint}: it has no {METHOD_STATE}"])
        saved = json.loads(file.read_text())["identity"]
        if problems := [
            f"{checkpoint} was begun with {name} {saved.get(name)!r} instead of {value!r} (--overwrite_output_dir "
            "starts over)"
            for name, value in self._identity().items()
            if saved.get(name) != value
        ]:
            raise ConfigError(problems)


class _AroundTheStep(TrainerCallback):
    """The places that the `Trainer` opens to callbacks alone."""

    def __init__(self, trainer: MethodTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer.method.prepare(self.trainer.model, self.trainer.bare_optimizer, _reduce(args))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer.before_optimizer_step()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer.after_optimizer_step()


def _reduce(args: TrainingArguments) -> Any:
    """What averages a tensor over the processes, in place."""
    if args.world_size == 1:
        return lambda tensor: tensor
    return mean_over_processes


def _spare(optimizer: Optimizer, model: nn.Module, decayed: set[str]) -> None:
    """Move the parameters outside `decayed` into groups without weight decay. States are keyed by parameter."""
    names = {param: name for name, param in model.named_parameters()}
    for group in list(optimizer.param_groups):
        keep = [names[param] in decayed for param in group["params"]]
        per_param = [key for key in ("params", "param_names") if key in group]
        spared = {**group, "weight_decay": 0.0}
        for key in per_param:
            spared[key] = [value for value, kept in zip(group[key], keep, strict=True) if not kept]
            group[key] = [value for value, kept in zip(group[key], keep, strict=True) if kept]
        if spared["params"]:
            optimizer.param_groups.append(spared)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
