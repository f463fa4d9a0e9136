"""The model of a checkpoint as it was trained, put together from its training state on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_pretraining.checkpoint import resume, run_dir
from peft_pretraining.checkpoint.contents import describe, quietly, without_unsaved_rests
from peft_pretraining.checkpoint.safe_loading import load_tensors
from peft_pretraining.checkpoint.train_state import read_counters
from peft_pretraining.config import Config, config_flags
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.models.llama import cast_weights, torch_dtype
from peft_pretraining.models.loading import load_pretrained


@dataclass
class Trained:
    """A checkpoint's parts."""

    config: Config
    method: TrainingMethod
    model: nn.Module
    """The training model, factors and frozen weights included."""
    plain: PreTrainedModel
    """The plain LLaMA of the checkpoint's own folder, in the dtype that it was written in."""

    @classmethod
    def read(cls, checkpoint: Path) -> Trained:
        """Raises `ConfigError` where anything is missing or cannot be used."""
        config = Config.from_settings(settings_of(checkpoint))
        plain, model = load_plain(checkpoint), load_plain(checkpoint)
        method = load_method(config.method.method)(config)
        precision = config.resolved_precision()
        if precision.norm_dtype != precision.weight_dtype:  # transformers gives all weights one dtype
            cast_weights(model, plain.dtype, torch_dtype(precision.norm_dtype))
        training = method.convert(model)
        with quietly():
            try:
                tensors = without_unsaved_rests(training.state_dict(), describe(checkpoint))
                load_tensors({"model": tensors}, checkpoint / run_dir.TENSORS_DIR, distributed=False)
            except (OSError, ValueError) as error:
                raise ConfigError([f"{checkpoint} cannot be loaded: {error}"]) from error
        return cls(config, method, training, plain)

    def widen(self, dtype: torch.dtype | None) -> torch.dtype:
        """Cast the model so that what is computed from it may be rounded to `dtype` once (None: that of training);
        returns the dtype that `filled` then has."""
        wanted = dtype or self.plain.dtype
        self.model.to(torch.promote_types(self.plain.dtype, torch.promote_types(wanted, torch.float32)))
        return wanted

    def filled(self, weights: dict[str, Tensor], dtype: torch.dtype | None) -> PreTrainedModel:
        """The plain model with these weights, rounded to `dtype`; norms may be wider where it is None."""
        wanted, precision = dtype or self.plain.dtype, self.config.resolved_precision()
        self.plain.to(wanted)  # type: ignore[arg-type]  # transformers' decorator hides that it is a method
        if dtype is None and precision.norm_dtype != precision.weight_dtype:
            cast_weights(self.plain, wanted, torch_dtype(precision.norm_dtype))
        self.plain.load_state_dict(weights)
        self.plain.config.dtype = wanted
        return self.plain


def merged_model(checkpoint: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model that `checkpoint` computes, without factors, on the CPU; `dtype` None is the one it was trained in.

    Merged in float32 at least from the frozen weights and factors of the training state, and rounded once: a float32
    export of a bfloat16 run keeps what the checkpoint's own export had to round away. The checkpoint itself says how it
    was trained; for an older one, which does not, the run's settings beside it do. Raises `ConfigError` if both are
    missing, or cannot be used.
    """
    return merged(Trained.read(checkpoint), dtype)


def merged(trained: Trained, dtype: torch.dtype | None) -> PreTrainedModel:
    """The same of a checkpoint that has been read. Its plain model is used up."""
    trained.widen(dtype)
    return trained.filled(trained.method.merged_state_dict(trained.model), dtype)


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The settings under which a checkpoint was written, each through its flag's own converter."""
    path = checkpoint / run_dir.STATE_FILE
    try:
        record = resume.record_of(read_counters(checkpoint))
        if record is None:
            path = checkpoint.parent / run_dir.CONFIG_FILE
            record = resume.record_in_config(checkpoint.parent)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    if record is None:
        raise ConfigError([f"{path}: not found; it says how {checkpoint} was trained"])
    settings: dict[str, Any] = {}
    for flag in config_flags():
        value = record.settings.get(flag.name)
        if value is None:  # which some settings are
            if flag.name in record.settings:
                settings[flag.name] = None
            continue
        try:
            settings[flag.name] = flag.convert(",".join(map(str, value)) if isinstance(value, list) else str(value))
        except ValueError as error:
            raise ConfigError([f"{path}: {flag.name} {error}, and is {str(value)[:100]!r}"]) from error
    if settings.get("method") not in METHODS:
        raise ConfigError([f"{path}: there is no method {str(settings.get('method'))[:100]!r}"])
    return settings


def load_plain(checkpoint: Path) -> PreTrainedModel:
    """The checkpoint's own export, in the dtype that it was written in. Raises `ConfigError`."""
    name = str(checkpoint)
    return load_pretrained(AutoModelForCausalLM, name, name, dtype="auto", attn_implementation="sdpa")
