"""Lines of files, compressed or not, as bytes, of bounded length: the only way in which text files are read here.

A line ends at a line feed and nowhere else: what Python also takes for line ends (carriage returns, U+2028, U+0085) is
text, and blank is what has nothing but ASCII's white space. Decompression is streamed, so that neither a line without
an end nor a small file that unpacks to gigabytes takes more memory than the longest line that is allowed.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import zstandard

from peft_pretraining.checkpoint.plain_files import regular

LONGEST_DOCUMENT = 32
"""MB (10^6 bytes) of a document, or of the line that it is on, unless told otherwise."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MEGABYTE = 10**6

_BUFFER = 2**20
_COMPRESSED_STEP = 2**10  # zstd packs up to 32 kB into a byte: what a step unpacks must fit into memory


class TooLong(bytes):
    """Stands for a line of more bytes than are allowed, of which nothing is kept."""

    size: int
    """Bytes of the line, its end included."""

    def __new__(cls, size: int) -> TooLong:
        made = super().__new__(cls)
        made.size = size
        return made

    def __reduce__(self):
        return TooLong, (self.size,)


class LineReader:
    """The lines of a binary file, with their ends, each of at most `limit` bytes or a `TooLong`.

    >>> short, long = LineReader(io.BytesIO(b"short\\n" + 100 * b"x"), limit=10)
    >>> short, long.size
    (b'short\\n', 100)
    """

    def __init__(self, file: BinaryIO, limit: int):
        self._file, self._limit = file, limit

    def __iter__(self) -> Iterator[bytes]:
        readline, limit = self._file.readline, self._limit
        while data := readline(limit + 1):
            if len(data) <= limit or data.endswith(b"\n"):
                yield data
                continue
            size = len(data)
            while not data.endswith(b"\n") and (data := readline(_BUFFER)):
                size += len(data)
            yield TooLong(size)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_binary(path: Path) -> io.BufferedReader:
    """The file's bytes, decompressed on the way (`.gz`, `.zst`). `OSError` where it is no file, such as a pipe."""
    regular(path)
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), _BUFFER)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path), _BUFFER)
    return io.BufferedReader(open(path, "rb", buffering=0), _BUFFER)


def files_only(paths: Iterable[Path], problems: list[str], what: str = "") -> list[Path]:
    """The regular files among `paths`, without folders. What is neither is added to `problems`."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            continue
        if not os.path.exists(path):
            problems.append(f"{what}{path}: a link that leads nowhere")
        elif not os.path.isfile(path):
            problems.append(f"{what}{path}: a pipe or device, not a file")
        else:
            files.append(path)
    return files


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing, a byte-order mark aside."""
    return not isinstance(line, TooLong) and not line.removeprefix(BYTE_ORDER_MARK).strip()


class _ZstdFile(io.RawIOBase):
    """A zstd file of any number of frames. Unlike the package's own reader it notices a file that is cut short."""

    def __init__(self, path: Path):
        import zstandard

        # `zstd --long` needs 2^27; larger windows would have to be asked for when unpacking, too.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
        self._error = zstandard.ZstdError
        self._file = open(path, "rb", buffering=_BUFFER)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_COMPRESSED_STEP)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of a frame was reached")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._unpacked = self._frame.decompress(self._packed)
            except self._error as error:
                raise OSError(f"not a valid zstd file ({error})") from error
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
