"""What a fine-tuning run was begun with: `run.json`, in its folder and in each of its checkpoints.

Files of rows are compared by their content, models and tokenizers in folders by a fingerprint: where they lie may
change. Settings in `training_table.MAY_CHANGE` may be others when a run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.checkpoint.plain_files import regular
from peft_pretraining.finetune.command_line import method_setting_names
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.finetune.training_table import MAY_CHANGE, OBEYED
from peft_pretraining.flags import ConfigError

log = logging.getLogger("peft_pretraining")

RUN_FILE = "run.json"

_MODELS = ("model_name_or_path", "model_name", "tokenizer_name", "tokenizer")
_OLDER = "checkpoints_without_manifest"
_SAMPLE = 2**20
_LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers")
Settings = dict[str, Any]


def settings_of(finetuning: FineTuning) -> Settings:
    """Everything that the command asks for, flat, as JSON gives it back."""
    config, values = finetuning.config, finetuning.values
    names = method_setting_names() | {"adam_eps"}
    settings = {name: value for name, value in config.settings().items() if name in names}
    if not finetuning.target_modules_given:
        settings["target_modules"] = None
    settings["lora_all_modules"] = finetuning.lora_all_modules
    settings |= {name: value for name, value in values.items() if name in OBEYED}
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * config.batch.world_size
    settings |= {"seed": config.run.seed, "rows in an update": batch}
    task = finetuning.task
    for item in dataclasses.fields(task):
        value = getattr(task, item.name)
        if item.name.endswith("_file") and value is not None and item.name not in MAY_CHANGE:
            value = {"name": value, "content": _digest_of_file(Path(value))}
        elif item.name in _MODELS and value is not None:
            value = {"name": value, "content": _fingerprint(Path(value))}
        settings[item.name] = value
    return json.loads(json.dumps(settings, default=str))


def _digest_of_file(path: Path) -> str | None:
    """None where there is no such file, which is told when it is read."""
    return run_dir.file_digest(path)["sha256"][:16] if path.is_file() else None


def _fingerprint(folder: Path) -> str | None:
    """Of a model's folder: its JSON files, and of its weights the size and both ends. None for a hub name."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in _TOKENS_AND_SHAPE or path.suffix in (".safetensors", ".bin", ".model"):
            if not path.is_file() or path.name == "training_args.bin":
                continue
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


_TOKENS_AND_SHAPE = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt")


def write_settings(folder: Path, settings: Settings, older_checkpoints: Iterable[str] = ()) -> None:
    """Write `run.json`. older_checkpoints: names of those that the run goes on from, but that have no manifest."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    content = {"settings": settings, "versions": versions, _OLDER: sorted(older_checkpoints)}
    run_dir.write_atomically(folder / RUN_FILE, json.dumps(content, indent=2) + "\n")


def read_settings(folder: Path) -> Settings | None:
    """The settings in a folder's `run.json`; None where there is no such file. Raises `ConfigError`."""
    path = folder / RUN_FILE
    try:
        found = json.loads(regular(path).read_text())["settings"]
        if not isinstance(found, dict):
            raise TypeError("it has no settings")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError([f"{path} cannot be read ({type(error).__name__}: {why})"]) from None
    return found


def noted_as_older(folder: Path) -> list[str]:
    """The `older_checkpoints` that `write_settings` noted; none where that cannot be read."""
    try:
        found = json.loads(regular(folder / RUN_FILE).read_text())[_OLDER]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """`learning_rate 0.1 instead of 0.2` for everything that must not differ; what may is left out.

    A setting that only one of the two has is one of another version of this project, or of transformers.
    """
    for name in sorted({*begun} & {*now} - MAY_CHANGE):
        old, new = begun[name], now[name]
        if old == new or (_content(old) is not None and _content(old) == _content(new)):
            continue
        if _content(old) is not None and _content(new) is not None:
            if old["name"] == new["name"]:
                yield f"another content of {name} {old['name']}"
                continue
        yield f"{name} {_shown(old)} instead of {_shown(new)}"


def _content(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else None


def _shown(value: Any) -> str:
    value = value["name"] if isinstance(value, dict) and "name" in value else value
    return repr(value) if len(repr(value)) < 100 else f"{value!r:.100}..."
