"""The precision that a run began with, which it keeps when it goes on. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path

from peft_pretraining.checkpoint.plain_files import regular
from peft_pretraining.config import Config, recorded
from peft_pretraining.config.precision_config import OF_DTYPE, name_of, resolve

_KEPT = ("state_dtype", "basis_dtype", "gradient_sum_dtype", "matmul_precision")
_OF_SAVED_TENSORS = ("state_dtype", "basis_dtype")


def keep(config: Config, given: Collection[str], problems: list[str]) -> Config:
    """With the recorded precision in place of what is not asked for, where a run goes on; what contradicts it is a
    problem that names both. `given`: names of the flags of the command line."""
    found = _begun(config)
    if found is None:
        return config
    what, begun = found
    asked, name = config.precision, name_of(begun.precision, begun.model.dtype)
    if asked.precision not in ("auto", name):
        given = f"--precision {asked.precision}" if config.model.dtype == "auto" else f"--dtype {config.model.dtype}"
        problems.append(f"{what}: it was begun with --precision {name}, which {given} contradicts: leave it out")
        return config
    default = type(asked)()
    settings = {key: getattr(asked if _is_asked(config, key, given) else begun.precision, key) for key in _KEPT}
    for key in _OF_SAVED_TENSORS:
        old, new = getattr(begun.precision, key), settings[key]
        if key == "state_dtype":  # what `auto` is depends on the precision alone
            old = resolve(begun.precision, begun.model.dtype, "cpu").state_format
            new = old if new == "auto" else new
        if getattr(asked, key) != getattr(default, key) and new != old and _matters(key, name):
            problems.append(f"{what}: it was begun with --{key} {old}, not {new}: leave it out")
    return config.replace(precision=name, dtype=begun.model.dtype, **settings)


def _is_asked(config: Config, key: str, given: Collection[str]) -> bool:
    """Whether a value is wanted: of saved tensors another than the default, which leaves it to the run."""
    is_default = getattr(config.precision, key) == getattr(type(config.precision)(), key)
    return key in given and not (is_default and key in _OF_SAVED_TENSORS)


def _matters(key: str, name: str) -> bool:
    """States of weights in float32 and more are the same in all formats."""
    return key != "state_dtype" or name in ("bf16", "bf16_sr")


def _begun(config: Config) -> tuple[str, Config] | None:
    """Whose precision is to be kept, in words, and the settings of its precision; None where nothing says any."""
    for what, folder, is_of_run in recorded.folders(config):
        # What is wrong with the folder is said where it is checked.
        with contextlib.suppress(OSError, ValueError):
            if (begun := _read(folder, is_of_run)) is not None:
                return what, begun
    return None


def _read(folder: Path, is_of_run: bool) -> Config | None:
    """The settings of precision that a run's folder, or a checkpoint, has."""
    settings, saved = recorded.settings_of(folder, is_of_run)
    known = {name: settings[name] for name in ("precision", "dtype", *_KEPT) if name in settings}
    begun = Config.from_settings(known)
    if "precision" not in settings:  # TF32 came together with it
        begun = begun.replace(matmul_precision="highest")
    if name_of(begun.precision, begun.model.dtype) != "auto":
        return begun
    for checkpoint in saved:  # written before the precision was recorded: the weights say it
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            dtype = json.loads(regular(checkpoint / "config.json").read_text())["dtype"]
            return begun.replace(precision=OF_DTYPE[dtype])
    return None
