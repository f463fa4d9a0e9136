"""Where documents come from: local text, JSON and Parquet files, folders saved by `datasets`, the hub.

`find_source` looks at names only, and imports nothing heavy; pieces.py reads what it finds.
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peft_pretraining.data.lines import files_only

HUB_ALIASES = {"c4": "allenai/c4"}  # the plain name needs a loading script, which `datasets` no longer runs
SUPPORTED = (".txt", ".json", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """What `--dataset` stands for, before anything of it is read."""

    kind: Literal["files", "saved", "hub"]
    name: str
    """Its part of the result's name."""
    origin: str
    """The folder that `datasets` saved, or the hub name; for files, what the user gave."""
    files: dict[str, list[Path]] = field(default_factory=dict)
    """Files of each split, sorted by name."""
    force_json: bool = False

    @property
    def has_fields(self) -> bool:
        """Whether `--text_field` chooses anything: plain text has nothing but text."""
        files = itertools.chain(*self.files.values())
        return self.kind != "files" or self.force_json or any(file_format(file) != ".txt" for file in files)


def find_source(dataset: str, from_json: bool, problems: list[str], warnings: list[str]) -> Source | None:
    """Decide what `dataset` stands for. What is wrong with it is appended to `problems` (and None may come back)."""
    path = Path(dataset)
    if not from_json and any(os.path.isfile(path / marker) for marker in ("dataset_dict.json", "state.json")):
        return Source("saved", path.resolve().name, dataset)
    before = len(problems)
    if os.path.isdir(path):
        found = _files_in(path, from_json, problems)
        missing = (
            f"holds neither a dataset saved by `datasets` nor files of a known kind ({', '.join(SUPPORTED)}); "
            f"those of folders inside are read with a wildcard: '{path / '**' / '*.jsonl'}'"
        )
    elif glob.has_magic(dataset) and not os.path.isfile(path):
        names = sorted(glob.glob(dataset, recursive=True))
        found = files_only(map(Path, names), problems, "--dataset ")
        missing = "no file matches this wildcard"
        if names:  # folders, then
            missing += ", only folders: ** stands for any number of them"
    else:
        found = files_only([path], problems, "--dataset ") if os.path.lexists(path) else []
        missing = "file or folder not found"
        if not found and not from_json and _can_be_hub_name(dataset):
            hub_name = HUB_ALIASES.get(dataset, dataset)
            return Source("hub", hub_name, hub_name)
    if len(problems) > before:
        return None
    if not found:
        problems.append(f"--dataset {dataset}: {missing}")
        return None
    problems += _unreadable(found, from_json)
    return Source("files", _base_name(dataset), dataset, _splits_by_name(found, warnings), from_json)


def _files_in(folder: Path, from_json: bool, problems: list[str]) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        problems.append(f"--dataset {folder}: cannot be listed ({error.strerror})")
        return []
    return files_only((file for file in inside if from_json or file_format(file) in SUPPORTED), problems, "--dataset ")


def _can_be_hub_name(dataset: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", dataset)) and file_format(Path(dataset)) not in SUPPORTED


def file_format(path: Path) -> str:
    """The extension that says how to read a file, once decompressed: `.json` for `a.json.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _unreadable(files: Iterable[Path], from_json: bool) -> list[str]:
    problems = []
    for file in files:
        kind = ".json" if from_json else file_format(file)
        if kind not in SUPPORTED or (kind == ".parquet" and file.suffix in COMPRESSED):
            problems.append(
                f"--dataset {file}: unsupported extension (known: {', '.join(SUPPORTED)}; with .gz or .zst)"
            )
        elif file.suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
            problems.append(f"--dataset {file}: reading .zst files needs `pip install zstandard`")
    return problems


def _base_name(dataset: str) -> str:
    """`/data/c4/c4-train.*.json.gz` -> `c4-train`; a part that is nothing but a wildcard gives way to its folder."""
    for part in reversed(Path(os.path.abspath(dataset)).parts):
        name = Path(part)
        while name.suffix in (*SUPPORTED, *COMPRESSED):
            name = Path(name.stem)
        if cleaned := re.sub(r"\[[^]]*\]|[*?]", "", name.name).strip(" ._-"):
            return cleaned
    return "data"


def _splits_by_name(files: list[Path], warnings: list[str]) -> dict[str, list[Path]]:
    """As C4 names its files: `*train*` next to `*validation*`; otherwise everything is for training."""
    validation = [file for file in files if "validation" in file.name]
    train = [file for file in files if "train" in file.name and file not in validation]
    if not (train and validation):
        return {"train": files}
    if unused := [str(file) for file in files if file not in train and file not in validation]:
        warnings.append(f"not used, for neither train nor validation is in the name: {', '.join(unused)}")
    return {"train": train, "validation": validation}
