"""Writing blocks of tokens as a folder that `datasets.load_from_disk` reads, without ever holding more than a few MiB.

`datasets` itself writes such folders only from a finished dataset, which would mean writing everything twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets.arrow_writer import ArrowWriter

TOKENS_PER_RECORD_BATCH = 2**22  # 8 or 16 MiB
TOKENS_PER_FILE = 2**27  # 256 or 512 MiB


def token_dtype(largest_id: int) -> np.dtype:
    """The smallest type of numbers that blocks are written in and that holds all ids up to `largest_id`.

    >>> token_dtype(65535), token_dtype(65536)
    (dtype('uint16'), dtype('int32'))
    """
    return np.dtype(np.uint16 if largest_id <= np.iinfo(np.uint16).max else np.int32)


class BlockWriter:
    """Cuts a stream of tokens into blocks of `length` and writes one split; the last incomplete block is dropped.

    `dtype` is one that `token_dtype` gives; `add` raises ValueError at an id that it does not hold.
    """

    def __init__(self, folder: Path, length: int, dtype: np.dtype | str = "int32"):
        from datasets import Features, List, Value

        self.documents = 0
        self.tokens = 0
        """Tokens of all documents, EOS included, also those that fill no block."""
        self.text_bytes = 0.0
        """Bytes of all documents' text in UTF-8; NaN where some slice did not count them."""
        self.blocks = 0
        self.largest_token_id = -1
        self.rows_passed_over = 0
        """Rows of the source that are no documents."""
        self._folder, self._length = folder, length
        self._features = Features({"input_ids": List(Value(str(np.dtype(dtype))), length=length)})
        # Written only when full, so that files do not depend on the sizes in which tokens arrive.
        self._buffer = np.empty(max(1, TOKENS_PER_RECORD_BATCH // length) * length, dtype=dtype)
        self._filled = 0
        self._file: ArrowWriter | None = None
        self._tokens_in_file = 0
        self._file_names: list[str] = []
        self._digest = hashlib.blake2b(digest_size=8)
        folder.mkdir()

    def add(self, ids: np.ndarray, documents: int, text_bytes: float = 0.0) -> None:
        """Append the tokens of so many documents, (tokens,) int32, whose text has so many bytes."""
        if ids.size and ids.max() > np.iinfo(self._buffer.dtype).max:
            raise ValueError(f"token id {ids.max()} does not fit into {self._buffer.dtype}")
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += ids.size
        while ids.size:
            part = ids[: self._buffer.size - self._filled]
            self._buffer[self._filled : self._filled + part.size] = part
            self._filled += part.size
            ids = ids[part.size :]
            if self._filled == self._buffer.size:
                self._write(self._buffer)
                self._filled = 0

    def adopt(self, folder: Path, description: dict[str, Any]) -> bool:
        """Take over the files of a finished split, as hard links, before anything is added; its counts with them.

        The tokens that filled none of its blocks are still to be added. Where the file system has no hard links they
        become relative symbolic links, and False comes back: the files must then stay where they are.
        """
        hard = True
        for name in description["files"]:
            self._file_names.append(f"data-{len(self._file_names):05d}.arrow")
            here, there = self._folder / self._file_names[-1], folder / name
            try:
                os.link(there, here)
            except OSError:  # which one depends on the file system
                here.symlink_to(os.path.relpath(there, self._folder))
                hard = False
        self.documents += description["documents"]
        self.tokens += description["tokens"] - len(description["remainder"])
        self.text_bytes += description.get("text_bytes", math.nan)  # older slices do not have it
        self.blocks += description["blocks"]
        self.rows_passed_over += description.get("rows_passed_over", 0)  # older slices refused them
        self.largest_token_id = max(self.largest_token_id, description["largest_token_id"])
        self._digest.update(description["fingerprint"].encode())
        return hard

    def describe(self) -> dict[str, Any]:
        """What `adopt` has to know about the finished split, as JSON: counts, sizes of files in bytes, tokens left."""
        used = self._filled // self._length * self._length
        return {
            **{"documents": self.documents, "tokens": self.tokens, "blocks": self.blocks},
            "dtype": self.dtype,
            "text_bytes": self.text_bytes,
            "largest_token_id": self.largest_token_id,
            "rows_passed_over": self.rows_passed_over,
            "fingerprint": self._digest.hexdigest(),
            "files": {name: (self._folder / name).stat().st_size for name in self._file_names},
            "remainder": self._buffer[used : self._filled].tolist(),
        }

    def finish(self) -> None:
        """Write what is left, and the files that make the folder a dataset."""
        from datasets import DatasetInfo, config

        self._write(self._buffer[: self._filled // self._length * self._length])
        self._close_file()
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self._file_names],
            "_fingerprint": self._digest.hexdigest(),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._folder.name,
        }
        (self._folder / config.DATASET_STATE_JSON_FILENAME).write_text(json.dumps(state, indent=2))
        DatasetInfo(features=self._features).write_to_directory(str(self._folder))

    @property
    def dtype(self) -> str:
        """Of the numbers in the files."""
        return str(self._buffer.dtype)

    @property
    def tail(self) -> int:
        """Tokens at the end that fill no block."""
        return self._filled % self._length

    def discard(self) -> None:
        """Remove everything that was written."""
        self._close_file()
        shutil.rmtree(self._folder)

    def _write(self, tokens: np.ndarray) -> None:
        """Append whole blocks as one record batch, in a new file where the last is full."""
        import pyarrow as pa
        from datasets.arrow_writer import ArrowWriter

        if not tokens.size:
            return
        if self._file is None:
            self._file_names.append(f"data-{len(self._file_names):05d}.arrow")
            self._file = ArrowWriter(features=self._features, path=str(self._folder / self._file_names[-1]))
        column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), self._length)
        self._file.write_table(pa.table({"input_ids": column}), writer_batch_size=len(column))
        self._digest.update(tokens.data)
        self.blocks += len(column)
        self.largest_token_id = max(self.largest_token_id, int(tokens.max()))
        self._tokens_in_file += tokens.size
        if self._tokens_in_file >= TOKENS_PER_FILE:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.finalize()
            self._file, self._tokens_in_file = None, 0


def write_dataset_dict(folder: Path, splits: Iterable[str]) -> None:
    """Make a folder of splits a `DatasetDict`."""
    from datasets import config

    (folder / config.DATASETDICT_JSON_FILENAME).write_text(json.dumps({"splits": list(splits)}))
