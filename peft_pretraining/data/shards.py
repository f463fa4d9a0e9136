"""The files that documents are streamed from: JSON lines on a disk or on the hub, and reading them on from any line.

A plain file is read on from exactly the byte that is asked for. Of a `.json.gz` what lies before it has to be
decompressed (gzip knows no way round that), but neither split into lines nor parsed. Nothing here imports torch.
"""

from __future__ import annotations

import gzip
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peft_pretraining.data.json_rows import Unusable, encodable, one_line, parse_object
from peft_pretraining.data.lines import (
    LONGEST_DOCUMENT,
    MEGABYTE,
    LineReader,
    TooLong,
    files_only,
    is_blank,
    open_binary,
)

log = logging.getLogger("peft_pretraining")

HUB_DATASET, HUB_CONFIG = "allenai/c4", "en"
EXTENSIONS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SPLITS = ("train", "validation")
TEXT_FIELD = "text"
RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60)
"""Waits before reading is tried again; two minutes in all, after which the run ends."""

_HUB_TIMEOUT = 10.0


class DataError(RuntimeError):
    """The data cannot be read on, in one line. What was saved stays good: the run can be resumed."""


class Line(NamedTuple):
    """One line of a shard, as it stands there."""

    offset: int
    """Bytes before it in the shard, uncompressed."""
    number: int
    """Lines before it in the shard."""
    data: bytes


@dataclass(frozen=True)
class Shard:
    """A file of documents, one JSON object a line."""

    name: str
    """Relative to the data folder, or to the dataset on the hub."""
    size: int
    """Bytes, as stored."""
    folder: str | None = None
    """The data folder; None on the hub."""
    revision: str | None = None
    """On the hub: the commit, which cannot change under a run."""
    longest: int = LONGEST_DOCUMENT * MEGABYTE
    """Bytes of the longest line that is read; of a longer one nothing is kept."""

    def __str__(self) -> str:
        return str(Path(self.folder) / self.name) if self.folder else f"{HUB_DATASET}/{self.name}"

    def path(self) -> Path:
        """Where it lies on this machine; a shard of the hub is downloaded into the hub client's own cache first.

        The client downloads into a temporary file, goes on with one that was cut off, and lets one process per machine
        download while the others wait. OSError whatever goes wrong.
        """
        if self.folder is not None:
            return Path(self.folder) / self.name
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    HUB_DATASET, self.name, repo_type="dataset", revision=self.revision, etag_timeout=_HUB_TIMEOUT
                )
            )
        except Exception as error:  # the client's, its HTTP library's and the disk's exceptions share no base
            raise OSError(f"download failed: {one_line(error)}") from error

    def fetch_ahead(self) -> None:
        """Begin to download a shard that will soon be wanted; whatever goes wrong shows when it is wanted."""

        def fetch() -> None:
            try:
                self.path()
            except OSError as error:
                log.warning("%s: %s; it will be tried again when it is needed", self, error)

        if self.folder is None:
            threading.Thread(target=fetch, daemon=True).start()

    def open(self, offset: int) -> LineReader:
        """Its lines, uncompressed, from byte `offset` on. DataError where it is not the file the run began with."""
        path = self.path()
        if (size := path.stat().st_size) != self.size:
            raise DataError(f"{self}: has {size} bytes, but had {self.size} when the run was launched")
        file = open_binary(path)
        if file.seek(offset) != offset:
            raise DataError(f"{self}: ends before byte {offset}, from which the run goes on")
        return LineReader(file, self.longest)

    def lines(self, offset: int = 0, number: int = 0) -> Iterator[Line]:
        """Its lines from the one at `offset` on, which is the `number`-th.

        Where reading fails it is tried again, from the line it had come to, after each of `RETRY_SECONDS`; DataError
        when nothing helped, and at once for a file that is damaged.
        """
        failures = 0
        while True:
            try:
                with self.open(offset) as file:
                    for data in file:
                        yield Line(offset, number, data)
                        size = data.size if isinstance(data, TooLong) else len(data)
                        offset, number, failures = offset + size, number + 1, 0
                return
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{self}: damaged or cut short near line {number + 1} ({one_line(error)})") from error
            except OSError as error:
                if failures == len(RETRY_SECONDS):
                    raise DataError(
                        f"{self}: cannot be read, after {failures} more attempts in {sum(RETRY_SECONDS):g} s "
                        f"({error.strerror or one_line(error)}); once it is back, launch the same command again"
                    ) from error
                wait = RETRY_SECONDS[failures]
                failures += 1
                log.warning("%s: %s; trying again in %g s", self, error.strerror or one_line(error), wait)
                time.sleep(wait)


@dataclass(frozen=True)
class Shards:
    """Everything that is streamed, by split, sorted by name."""

    origin: str
    """As the user knows it, for messages."""
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    def described(self) -> dict[str, Any]:
        """Names and sizes: data of another name or size is other data."""
        return {split: [[shard.name, shard.size] for shard in getattr(self, split)] for split in SPLITS}


def find_local_shards(
    folder: str, flag: str, problems: list[str], warnings: list[str], max_document_mb: float = LONGEST_DOCUMENT
) -> Shards | None:
    """The shards in `folder`: by their names, as C4 calls them, or in folders `train` and `validation`.

    What is wrong is appended to `problems` under the name `flag`, and None comes back.
    """
    origin, root, before = f"{flag} {folder}", Path(folder), len(problems)
    if not os.path.isdir(root):
        problems.append(f"{origin}: no such folder")
        return None
    try:
        inside = {split: _json_files(root / split, problems) for split in SPLITS if (root / split).is_dir()}
        beside = _json_files(root, problems)
    except OSError as error:
        problems.append(f"{origin}: cannot be listed ({error.strerror})")
        return None
    if len(problems) > before:
        return None
    if not inside:
        inside = {"validation": [file for file in beside if "validation" in file.name]}
        inside["train"] = [file for file in beside if "train" in file.name and file not in inside["validation"]]
        if unused := [file.name for file in beside if not any(file in files for files in inside.values())]:
            warnings.append(f"{origin}: {len(unused)} file(s) named neither train nor validation are not used")
    elif beside:
        warnings.append(f"{origin}: {len(beside)} file(s) beside the folders {' and '.join(inside)} are not used")
    found = {}
    for split in SPLITS:
        files = sorted(inside.get(split, []))
        found[split] = tuple(
            Shard(str(file.relative_to(root)), file.stat().st_size, folder, longest=int(max_document_mb * MEGABYTE))
            for file in files
        )
        if not files:
            problems.append(
                f"{origin}: no {split} shards: files ({', '.join(EXTENSIONS)}) with {split} in the name, "
                f"or in a folder {split}"
            )
        elif problem := _first_document_problem(found[split]):
            problems.append(problem)
    return Shards(origin, **found)


def _json_files(folder: Path, problems: list[str]) -> list[Path]:
    return files_only((file for file in folder.iterdir() if file.name.endswith(EXTENSIONS)), problems)


def _first_document_problem(shards: tuple[Shard, ...]) -> str | None:
    """What keeps the first document of a split from being read."""
    for shard in shards:
        try:
            with shard.open(0) as lines:
                first = next(((number, line) for number, line in enumerate(lines, start=1) if not is_blank(line)), None)
        except (OSError, EOFError, zlib.error) as error:
            return f"{shard}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})"
        if first is not None:
            text, reason = document_text(first[1])
            return f"{shard}: line {first[0]} {reason}" if text is None else None
    return f"{shards[0]}: holds no documents"


def document_text(line: bytes) -> tuple[str | None, str]:
    """The text of one line, or None and what is wrong with the line."""
    row = parse_object(line, TEXT_FIELD)
    if isinstance(row, Unusable):
        return None, row.reason
    if not isinstance(text := row.get(TEXT_FIELD), str):
        return None, f"has no text in a field {TEXT_FIELD!r}"
    return encodable(text), ""


def find_hub_shards(problems: list[str], max_document_mb: float = LONGEST_DOCUMENT) -> Shards | None:
    """C4's shards on the hub. One request says at once whether it can be reached."""
    origin, longest = f"{HUB_DATASET} ({HUB_CONFIG}) on the hub", int(max_document_mb * MEGABYTE)
    try:
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()  # or its retries would bury the one line that counts
        hub = huggingface_hub.HfApi()
        revision = hub.dataset_info(HUB_DATASET, timeout=_HUB_TIMEOUT).sha
        tree = hub.list_repo_tree(HUB_DATASET, HUB_CONFIG, repo_type="dataset", revision=revision)
        shards = sorted(
            (
                Shard(file.path, file.size, None, revision, longest)
                for file in tree
                if isinstance(file, huggingface_hub.hf_api.RepoFile) and file.path.endswith(EXTENSIONS)
            ),
            key=lambda shard: shard.name,
        )
    except Exception as error:  # no network, no such host, offline mode, a proxy: each with exceptions of its own
        problems.append(
            f"no --dataset_path and no --base_dir, and {origin}, which would be streamed, cannot be reached "
            f"({one_line(error)})"
        )
        return None
    found = {split: tuple(shard for shard in shards if f"-{split}." in shard.name) for split in SPLITS}
    if missing := [split for split in SPLITS if not found[split]]:
        problems.append(f"{origin}: holds no {missing[0]} shards")
        return None
    return Shards(origin, **found)
