"""transformers' `Trainer`, driving one of the training methods.

Data, schedule, evaluation, logging and checkpoints are the `Trainer`'s. A `TrainingMethod` (methods/base.py) changes
the model's layers, builds the optimizer and is called where training/loop.py calls it: before an update's first
forward pass and before the optimizer's step. The gradients' norm and their clipping are the optimizer's. What is saved
and restored of it is said in method_checkpointing.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from peft_pretraining.distributed import mean_over_processes
from peft_pretraining.finetune.checkpointing import reading
from peft_pretraining.finetune.checkpoints import TRAINER_STATE
from peft_pretraining.finetune.entry import RunFailed
from peft_pretraining.finetune.method_checkpointing import MethodCheckpointingTrainer
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.finetune.stopping import StopOnRequest, shielded
from peft_pretraining.finetune.targets import target_modules
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.optim.model_groups import record_groups
from peft_pretraining.optim.state.gradient_owner import GradientOwner, gradient_owner
from peft_pretraining.training.loop import state_bytes
from peft_pretraining.training.tracking import log

LARGEST_ROW_OF_SKIPS = 10
"""Updates in a row without a finite gradient after which a run ends."""


class MethodTrainer(MethodCheckpointingTrainer):
    """A `Trainer` for a model that it converts itself; everything else is passed on.

    The method's settings are those of `finetuning`, completed by the layers that the model has and by the number of
    updates, which follows from the training data. Without training data nothing is converted.
    """

    gradients: GradientOwner
    """The optimizer's answers about gradients, from the beginning of the training on."""

    def __init__(self, finetuning: FineTuning, model: PreTrainedModel, **arguments: Any):
        super().__init__(finetuning, model=model, **arguments)
        # Losses are means over a micro-batch. The default would be to trust that any model which takes further keywords
        # divides by the whole batch's targets itself; classifiers do not, and gradients would be too large.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_AroundTheStep(self))
        self.add_callback(StopOnRequest())
        self._micro_batch = 0
        self._skipped = False
        self._skips_in_a_row = 0
        if self.train_dataset is None:
            return
        with bad_input():
            config = finetuning.config
            if "target_modules" in METHODS[config.method.method].own:
                config = config.replace(target_modules=target_modules(model, finetuning))
            max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
            self._check_schedule(max_steps)
            self.method_config = config.replace(num_training_steps=max_steps)
            self._method = load_method(config.method.method)(self.method_config)
            self._adopt(self.method.convert(self.model))

    def _check_schedule(self, max_steps: int) -> None:
        """Raise now what is wrong with `--lr_scheduler_kwargs`, not after the model has been converted."""
        try:
            self.create_scheduler(max_steps, torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            kind = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
            why = " ".join(str(error).split())
            raise ConfigError([f"--lr_scheduler_type {kind} with these --lr_scheduler_kwargs: {why}"]) from error
        self.lr_scheduler, self._created_lr_scheduler = None, False

    def _adopt(self, converted: nn.Module) -> None:
        """Train what `convert` returned, which may be another model than it was given."""
        model = cast("PreTrainedModel", converted)
        if model is self.model:
            return
        self.model = self.model_wrapped = self.callback_handler.model = model
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)

    def train_to_the_end(self, resume_from: str | None) -> dict[str, Any]:
        """Train, from a checkpoint or from the beginning; `Trainer`'s numbers. Raises `RunFailed` where the weights are
        not finite in the end."""
        if resume_from is not None:
            with reading():
                TrainerState.load_from_json(str(Path(resume_from) / TRAINER_STATE))
        metrics = self.train(resume_from_checkpoint=resume_from).metrics
        self.check_finite()
        if self.state.global_step == self._initial_global_step:  # nothing was left to do, and nothing is known of it
            metrics = {name: value for name, value in metrics.items() if name in ("epoch", "total_flos")}
        return metrics

    def _get_dataloader(self, *arguments: Any, **keywords: Any) -> Any:
        return shielded(super()._get_dataloader(*arguments, **keywords))

    # The method's calls, in the order of training/loop.py's `train_step`.

    def training_step(self, model: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
        if self._micro_batch == 0:
            self.gradients.begin_update(self.state.global_step)
            self.method.before_update(self.model, self.bare_optimizer, self.state.global_step)
        self.gradients.begin_micro_batch(self._micro_batch, self.current_gradient_accumulation_steps)
        self._micro_batch += 1
        return super().training_step(model, *arguments, **keywords)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._gradient_norm()
        factor = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if self._skipped:
            return norm
        self.gradients.scale_(factor)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        return self._gradient_norm() if grad_norm is None else grad_norm

    def _gradient_norm(self) -> Tensor:
        """The method's norm of this update's gradients, which are complete and reduced; says whether to skip it."""
        self.accelerator.unscale_gradients()
        norm = self.gradients.grad_norm()
        self._skipped = not bool(norm.isfinite())
        return norm

    def before_optimizer_step(self) -> None:
        """The gradients are clipped. Without gradients, as after this for an update that is skipped, nothing moves."""
        self._micro_batch = 0
        if self._skipped:
            log.warning("skipped update %d: the gradient is not finite", self.state.global_step)
            self.bare_optimizer.zero_grad(set_to_none=True)
            self._skips_in_a_row += 1
            if self._skips_in_a_row == LARGEST_ROW_OF_SKIPS:
                raise RunFailed(
                    f"the gradients of {LARGEST_ROW_OF_SKIPS} updates in a row, up to {self.state.global_step}, are "
                    f"not finite: {self.where_to_go_on()} (a lower --learning_rate may help)"
                )
        else:
            self._skips_in_a_row = 0
            self.method.before_step(self.model, self.bare_optimizer, self.state.global_step)

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """With the method's numbers beside the loss."""
        if self._method is not None and "loss" in logs:
            logs = {**logs, **self.gradients.metrics()}
        super().log(logs, *arguments, **keywords)

    # The optimizer.

    @property
    def bare_optimizer(self) -> Optimizer:
        """The method's own, without accelerate's wrapper."""
        assert self.optimizer is not None, "the training has begun"
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The method's. As in transformers, `--weight_decay` spares biases and the weights of norms, unless they have
        been given a decay of their own."""
        if self.optimizer is None:
            with bad_input():
                optimizer = self.method.build_optimizer(self.model)
            if self.args.weight_decay and self.method_config.roles.norm_weight_decay is None:
                _spare(optimizer, self.model, set(self.get_decay_parameter_names(self.model)))
            self.optimizer = optimizer
        return self.optimizer

    def optimizer_report(self) -> dict[str, int]:
        """Bytes of the optimizer's state on this device, and numbers of weights: trained, and in all."""
        params = list(self.model.parameters())
        return {
            "optimizer_state_bytes": state_bytes(self.bare_optimizer),
            "trainable_parameters": sum(param.numel() for param in params if param.requires_grad),
            "parameters": sum(param.numel() for param in params),
        }


class _AroundTheStep(TrainerCallback):
    """The places that the `Trainer` opens to callbacks alone."""

    def __init__(self, trainer: MethodTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        trainer.method.prepare(trainer.model, trainer.bare_optimizer, _reduce(args))
        trainer.gradients = gradient_owner(trainer.bare_optimizer, trainer.model)
        for group in record_groups(trainer.model, trainer.bare_optimizer, trainer.method_config.optimizer.optimizer):
            log.info("%s", group)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer.before_optimizer_step()


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """A `ValueError`, of settings that do not go with the model, becomes a `ConfigError` of one line."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([" ".join(str(error).split())]) from error


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
