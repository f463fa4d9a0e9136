"""Models and tokenizers that somebody else has made: whatever is wrong with them is one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from transformers import PreTrainedModel

from peft_pretraining.flags import ConfigError

T = TypeVar("T")

_SHOWN = 4


def loaded(load: Callable[[], T], what: str) -> T:
    """What `load` returns. `ConfigError` for any exception: files of others make transformers raise all kinds."""
    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError([f"{what} cannot be loaded: {why}"]) from error


def checked_weights(
    model: PreTrainedModel, info: Mapping[str, Any], what: str, within: str = "", but: tuple[str, ...] = ()
) -> None:
    """Raise `ConfigError` where a folder lacks weights of the model, has more of them, or has some that are not finite.

    info: what `from_pretrained(output_loading_info=True)` says. Only names that begin with `within` count, without
    those that have one of `but` among their parts.
    """
    for kind, told in (("missing_keys", "lacks"), ("unexpected_keys", "has, beside the model's weights,")):
        names = sorted(name for name in info[kind] if name.startswith(within) and not set(but) & set(name.split(".")))
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ConfigError([f"{what} {told} {', '.join(names[:_SHOWN])}{more}"])
    if name := not_finite(model):
        raise ConfigError([f"{what}: the weights of {name} are not finite"])


def not_finite(model: PreTrainedModel) -> str | None:
    """The name of a parameter with numbers that are not finite, or of a buffer (which may be a mask of infinities) with
    some that are none; None where there is neither."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            return name
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            return name
    return None
