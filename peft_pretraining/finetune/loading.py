"""Models and tokenizers that somebody else has made: whatever is wrong with them is one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from peft_pretraining.flags import ConfigError

T = TypeVar("T")


def loaded(load: Callable[[], T], what: str) -> T:
    """What `load` returns. `ConfigError` for any exception: files of others make transformers raise all kinds."""
    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError([f"{what} cannot be loaded: {why}"]) from error


def check_finite(model: PreTrainedModel, what: str) -> None:
    """Raise `ConfigError` where a model that was loaded has weights that are not finite."""
    if name := not_finite(model):
        raise ConfigError([f"{what}: the weights of {name} are not finite"])


def not_finite(model: nn.Module) -> str | None:
    """The name of a parameter with numbers that are not finite, or of a buffer (which may be a mask of infinities) with
    some that are none; None where there is neither."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            return name
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            return name
    return None
