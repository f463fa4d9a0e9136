"""The folder of a run: its checkpoints, what makes one complete, and the settings the run was begun with.

    save_dir/
      config.yaml          every setting, library versions, the identity that a resumed run must share, the run's id,
                           and what each parameter group got
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
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.plain_files import regular

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
WANDB_RUN_FILE = "wandb_run.json"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "training_state.json"
TENSORS_DIR = "training_state"
LOCK_PREFIX = ".lock"
"""Of the names of the files by which a process holds the folder (folder_lock.py)."""

_WEIGHTS_INDEX = "model.safetensors.index.json"

_CHECKPOINT_NAME = re.compile(r"model_(0|[1-9][0-9]*)")


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


def lacks_of_a_run(folder: Path, files: Collection[str]) -> str | None:
    """Returns the name of a file that a checkpoint of pre-training must have and `files` does not list, or None."""
    for name in ("config.json", STATE_FILE, f"{TENSORS_DIR}/.metadata"):
        if name not in files:
            return name
    if not any(name.startswith(f"{TENSORS_DIR}/") and name.endswith(".distcp") for name in files):
        return f"{TENSORS_DIR}/*.distcp"
    if "model.safetensors" in files:
        return None
    if _WEIGHTS_INDEX not in files:
        return "model.safetensors"
    try:
        parts = json.loads(regular(folder / _WEIGHTS_INDEX).read_text())["weight_map"].values()
        return next((str(name) for name in parts if name not in files), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{_WEIGHTS_INDEX} that can be read"


def damage(folder: Path, lacks: Callable[[Path, Collection[str]], str | None] = lacks_of_a_run) -> str | None:
    """Returns why a checkpoint cannot be trusted, or None when every file is as it was written.

    `lacks` gives the name of a file that the checkpoint must have and its manifest does not list.
    """
    try:
        listed = json.loads(regular(folder / MANIFEST_FILE).read_text())["files"]
        files = {name: _entry(name, entry) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
    name = MANIFEST_FILE
    try:
        for name, (size, _) in files.items():  # sizes first: hashing reads everything
            if reason := _not_a_file_of(folder, name):
                return f"{name} {reason}"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} is truncated or overgrown ({found} bytes instead of {size})"
        for name, (_, checksum) in files.items():
            if file_digest(folder / name)["sha256"] != checksum:
                return f"{name} is damaged (its checksum differs)"
    except (OSError, ValueError) as error:  # a name may hold what no file system takes
        return f"{name} cannot be read ({error})"
    if missing := lacks(folder, files):
        return f"{MANIFEST_FILE} does not list {missing}"
    return None


def _entry(name: str, entry: Any) -> tuple[int, str]:
    """Size and checksum of one file of a manifest."""
    size, checksum = entry["bytes"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(checksum, str):
        raise ValueError(f"no size and checksum of {name}")
    return size, checksum


def _not_a_file_of(folder: Path, name: str) -> str | None:
    """Returns why `name`, of a manifest, is no regular file inside the checkpoint's own folder, or None."""
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or os.sep != "/":
        return "lies outside the checkpoint"
    for depth in range(1, len(parts) + 1):
        path = folder.joinpath(*parts[:depth])
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
        if stat.S_ISLNK(mode):
            return "is a link, which may lead out of the checkpoint"
        if depth == len(parts) and not stat.S_ISREG(mode):
            return "is not a file"
    return None


def newest_good_checkpoint(save_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint (None when there is none) and one line for every one that was skipped.

    >>> import tempfile
    >>> newest_good_checkpoint(tempfile.mkdtemp())
    (None, [])
    """
    skipped: list[str] = []
    for _, folder in completed_checkpoints(save_dir):
        if (reason := damage(folder)) is None:
            return folder, skipped
        skipped.append(f"skipped checkpoint {folder}: {reason}")
    return None, skipped


def remove(path: Path) -> None:
    """Remove whatever has this name: a folder and all in it, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(save_dir: Path) -> None:
    """Remove what saves that were interrupted left, of whatever type.

    A checkpoint that was moved aside, to be written anew, gets its name back if the new one never got it.
    """
    for aside in save_dir.glob("model_*.replaced"):
        final = aside.with_suffix("")
        if not os.path.lexists(final) and aside.is_dir() and not aside.is_symlink():
            aside.rename(final)
    for pattern in ("model_*.tmp", "model_*.replaced", f"{CONFIG_FILE}.tmp", f"{METRICS_FILE}.tmp"):
        for leftover in save_dir.glob(pattern):
            remove(leftover)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)
    with open(temporary, "x", encoding="utf-8") as file:  # never through a link
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
    """Returns `config.yaml` of a run: `settings`, `identity`, `versions` and, unless it is old, `run` and
    `parameter_groups`; None when there is none, or it is empty.

    Raises `ValueError` with the reason when the file is no mapping, or cannot be read.
    """
    from peft_pretraining.flags import yaml_file

    path = Path(save_dir) / CONFIG_FILE
    if not path.is_file() or path.stat().st_size == 0:
        return None
    return yaml_file.load_mapping(path)


def write_run_config(
    save_dir: Path,
    settings: dict[str, Any],
    identity: dict[str, Any],
    versions: dict[str, str],
    run: dict[str, Any] | None = None,
    parameter_groups: Sequence[dict[str, Any]] = (),
) -> None:
    """`run` says which run it is: see `resume.RunRecord`. `parameter_groups`: see `optim.group_record`."""
    import yaml

    content = {"settings": plain(settings), "identity": plain(identity), "versions": versions}
    if run is not None:
        content["run"] = run
    if parameter_groups:
        content["parameter_groups"] = list(parameter_groups)
    write_atomically(save_dir / CONFIG_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def differences(begun_with: dict[str, Any], now: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """(name, old, new) of everything that two flat mappings disagree on."""
    now = plain(now)
    for name in sorted({*begun_with, *now}):
        if begun_with.get(name) != now.get(name):
            yield name, begun_with.get(name), now.get(name)


def plain(value: Any) -> Any:
    """Tuples as lists, as YAML and JSON give them back."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
