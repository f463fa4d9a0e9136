"""`--target_modules` against the model that is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peft_pretraining.flags import ConfigError
from peft_pretraining.models.targets import TargetError

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@contextlib.contextmanager
def named_by_flag(config: Config) -> Iterator[None]:
    """What is wrong with the target layers becomes a `ConfigError` that names the flag."""
    try:
        yield
    except TargetError as error:
        given = ",".join(config.method.target_modules)
        raise ConfigError([f"--target_modules {given}: {error}"]) from error
