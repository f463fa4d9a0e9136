"""Bytes of the tensors that are alive, on the meta device or any other: every storage from birth to death."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """Counts storages that operators return while this is active, and that were not there before."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.now = 0
        """The most so far, and at present."""
        self.largest: dict[int, int] = {}
        """Bytes of the storages that are alive, by identity."""
        self._known: set[int] = set()

    def know(self, *tensors: torch.Tensor) -> None:
        """These were there before: their storages do not count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._known.discard, storage._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_iter((args, kwargs or {})):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self.largest:
                self.know(value)
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._born(value.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.largest or key in self._known:
            return
        self.largest[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.bytes = max(self.bytes, self.now)
        weakref.finalize(storage, self._dead, key)

    def _dead(self, key: int) -> None:
        self.now -= self.largest.pop(key, 0)


@contextlib.contextmanager
def peak_bytes() -> Iterator[Peak]:
    with Peak() as peak:
        yield peak
