"""The description of a checkpoint's tensors, read without running anything that it names.

torch.distributed.checkpoint keeps it in a pickle, `.metadata`. Here that is read with stand-ins for the few classes
that a description consists of; the real objects are made from the stand-ins' checked fields, so that nothing the file
says touches a class of this process.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
_DCP = "torch.distributed.checkpoint."


class _Record:
    """What stands for an object of a description: its fields, as the pickle has them."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensor(_Record):
    pass


class _Properties(_Record):
    pass


class _Chunk(_Record):
    pass


class _Index(_Record):
    pass


class _Storage(_Record):
    pass


class _Description(_Record):
    pass


class _Object(_Record):
    """For torch.distributed.checkpoint something that `torch.load` may unpickle as it likes."""


class _Ignored(_Record):
    """Read over: where the checkpoint was written, and the memory formats that no longer mean anything."""

    def __init__(self, *_: Any) -> None:
        self.state = None


class _Function:
    """What stands for a function: it can be called, and a pickle can set nothing on it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a function")


def _numbers(numbers: Any = ()) -> tuple[int, ...]:
    return tuple(_whole(number, "a size") for number in numbers)


_size, _ignored = _Function(_numbers), _Function(_Ignored)


_STANDINS: dict[tuple[str, str], Any] = {
    (_DCP + "metadata", "Metadata"): _Description,
    (_DCP + "metadata", "MetadataIndex"): _Index,
    (_DCP + "metadata", "TensorStorageMetadata"): _Tensor,
    (_DCP + "metadata", "TensorProperties"): _Properties,
    (_DCP + "metadata", "ChunkStorageMetadata"): _Chunk,
    (_DCP + "metadata", "BytesStorageMetadata"): _Object,
    (_DCP + "metadata", "StorageMeta"): _Ignored,
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): _Ignored,
    (_DCP + "filesystem", "_StorageInfo"): _Storage,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _ignored,
    ("builtins", "getattr"): _ignored,  # how some versions of Python pickle a member of an enumeration
    **{(module, name): _ignored for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}
"""By module and name: all that a description may refer to, besides torch's dtypes."""


class _Unpickler(pickle._Unpickler):  # in Python: the one in C takes as much memory as any number in the file says
    def find_class(self, module: str, name: str) -> Any:
        if (known := _STANDINS.get((module, name))) is not None:
            return known
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise ValueError(f"it refers to {module}.{name}, which is no part of a description of tensors")

    # The registry of copyreg's extensions belongs to this process.
    def get_extension(self, code: int) -> Any:
        raise ValueError(f"it refers to the extension {code}")


def _refused_opcode(unpickler: Any) -> None:
    raise ValueError("it calls a class by an opcode of old pickles")


# INST and OBJ call whatever lies on the stack; no description that torch wrote has them.
_Unpickler.dispatch = {**pickle._Unpickler.dispatch, pickle.INST[0]: _refused_opcode, pickle.OBJ[0]: _refused_opcode}


def read_description(content: bytes) -> Metadata:
    """The description of a checkpoint's tensors that a `.metadata` file holds.

    Raises `ValueError` with the reason when it is damaged, refers to anything but tensors in the checkpoint's own data
    files, or names any class that a description does not consist of.
    """
    try:
        found = _Unpickler(io.BytesIO(content)).load()
    except ValueError:
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except Exception as error:  # a damaged pickle raises anything: IndexError, KeyError, UnpicklingError, ...
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error
    fields = _fields(found, _Description, "a description")
    tensors, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not (isinstance(tensors, dict) and isinstance(places, dict)):
        raise ValueError("it lists no tensors")
    return Metadata(
        state_dict_metadata={_text(name, "a name"): _tensor(name, entry) for name, entry in tensors.items()},
        planner_data=None,
        storage_data=dict(_place(index, place) for index, place in places.items()),
        storage_meta=StorageMeta(),
        version=str(fields["version"]) if isinstance(fields.get("version"), str) else None,
    )


def _tensor(name: str, entry: Any) -> TensorStorageMetadata:
    if isinstance(entry, _Object):
        raise ValueError(f"{name} is a pickled object: only tensors are read")
    fields = _fields(entry, _Tensor, f"the entry of {name}")
    properties, chunks = fields.get("properties"), fields.get("chunks")
    state = properties.state if isinstance(properties, _Properties) else None
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[0], torch.dtype)):
        raise ValueError(f"{name} has no dtype")
    if not isinstance(chunks, list):
        raise ValueError(f"{name} has no chunks")
    return TensorStorageMetadata(
        TensorProperties(dtype=state[0]), _shape(fields.get("size"), name), [_chunk(part, name) for part in chunks]
    )


def _chunk(part: Any, name: str) -> ChunkStorageMetadata:
    fields = _fields(part, _Chunk, f"a chunk of {name}")
    return ChunkStorageMetadata(_shape(fields.get("offsets"), name), _shape(fields.get("sizes"), name))


def _place(index: Any, place: Any) -> tuple[MetadataIndex, _StorageInfo]:
    """Which part of which tensor, and where it lies."""
    key = _fields(index, _Index, "a tensor's part")
    name = _text(key.get("fqn"), "a name")
    offset, number = key.get("offset"), key.get("index")
    where = _fields(place, _Storage, f"the place of {name}")
    path = _text(where.get("relative_path"), f"the place of {name}")
    if not _DATA_FILE.fullmatch(path):
        raise ValueError(f"{name} lies in {path!r}, which is no data file of the checkpoint")
    if where.get("transform_descriptors"):
        raise ValueError(f"{name} is written in another way ({where['transform_descriptors']!r})")
    return (
        MetadataIndex(
            name,
            None if offset is None else _shape(offset, name),
            None if number is None else _whole(number, f"the index of {name}"),
        ),
        _StorageInfo(path, _whole(where.get("offset"), "an offset"), _whole(where.get("length"), "a length")),
    )


def _fields(found: Any, kind: type[_Record], what: str) -> Mapping[str, Any]:
    """A stand-in's fields; a frozen dataclass with slots, as another torch may have it, gives a pair."""
    state = getattr(found, "state", None)
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = state[1]
    if not (isinstance(found, kind) and isinstance(state, dict)):
        raise ValueError(f"{what} is missing")
    return state


def _shape(numbers: Any, name: str) -> torch.Size:
    if not isinstance(numbers, tuple):
        raise ValueError(f"{name} has no shape")
    return torch.Size([_whole(number, f"the shape of {name}") for number in numbers])


def _whole(number: Any, what: str) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError(f"{what} is {number!r}"[:200])
    return number


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text")
    return value
