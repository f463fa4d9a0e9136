"""The folder of a run: its checkpoints, what makes one complete, and the settings the run was begun with.

    save_dir/
      config.yaml          every setting, library versions, and the identity that a resumed run must share
      metrics.jsonl        one JSON object per update and per evaluation
      model_{update}/      a complete checkpoint (see checkpoint.py); model_{update}.tmp while it is being written

A checkpoint counts only if its name is final and every file matches the size and SHA-256 in its `manifest.json`:
torch.distributed.checkpoint itself loads flipped bytes without a word. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "training_state.json"
TENSORS_DIR = "training_state"

_CHECKPOINT_NAME = re.compile(r"model_(\d+)")


def completed_checkpoints(save_dir: str | Path) -> list[tuple[int, Path]]:
    """(update step, folder) of every checkpoint with its final name, newest first. They may still be damaged."""
    found = []
    if Path(save_dir).is_dir():
        for entry in Path(save_dir).iterdir():
            if (match := _CHECKPOINT_NAME.fullmatch(entry.name)) and entry.is_dir():
                found.append((int(match[1]), entry))
    return sorted(found, reverse=True)


def file_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of one file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def checkpoint_files(folder: Path) -> list[str]:
    """Relative names of all files of a checkpoint but its manifest."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in files if (name := path.relative_to(folder).as_posix()) != MANIFEST_FILE)


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None when every file is as it was written."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        written = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})"
    name = MANIFEST_FILE
    try:
        for name, size, _ in written:  # sizes first: hashing reads everything
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} is truncated or overgrown ({found} bytes instead of {size})"
        for name, _, checksum in written:
            if file_digest(folder / name)["sha256"] != checksum:
                return f"{name} is damaged (its checksum differs)"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint."""
    return json.loads((folder / STATE_FILE).read_text())


def newest_good_checkpoint(save_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint (None when there is none) and one line for every one that was skipped."""
    skipped = []
    for _, folder in completed_checkpoints(save_dir):
        if (reason := damage(folder)) is None:
            return folder, skipped
        skipped.append(f"skipped checkpoint {folder}: {reason}")
    return None, skipped


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (creations, renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_run_config(save_dir: str | Path) -> dict[str, Any] | None:
    """`config.yaml` of a run: `settings`, `identity`, `versions`; None when there is none.

    Raises `ValueError` with the reason when the file is no mapping, or cannot be read.
    """
    from peft_pretraining import yaml_file

    path = Path(save_dir) / CONFIG_FILE
    return yaml_file.load_mapping(path) if path.is_file() else None


def write_run_config(
    save_dir: Path, settings: dict[str, Any], identity: dict[str, Any], versions: dict[str, str]
) -> None:
    import yaml

    content = {"settings": _plain(settings), "identity": _plain(identity), "versions": versions}
    write_atomically(save_dir / CONFIG_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def differences(begun_with: dict[str, Any], now: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """(name, old, new) of everything that two flat mappings disagree on."""
    now = _plain(now)
    for name in sorted({*begun_with, *now}):
        if begun_with.get(name) != now.get(name):
            yield name, begun_with.get(name), now.get(name)


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML and JSON give them back."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
