"""The memory of a simulated device: every storage from its birth to its death, and who needed it at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

BLOCK = 512
"""Bytes to which CUDA's caching allocator rounds."""


@dataclass(eq=False)
class Storage:
    """One piece of the device's memory."""

    size: int
    """Bytes that the allocator gives for it."""
    operator: str
    """What made it."""
    shape: tuple[int, ...]
    """Of the tensor it was made for."""
    dtype: str
    phase: str
    """Of the update in which it was made."""
    component: str | None = None
    """What it is for, where somebody has said so."""


class Storages:
    """Follows storages by their identity; what is live at which moment is worked out afterwards, from the log."""

    def __init__(self) -> None:
        self._live: dict[int, Storage] = {}
        self._references: dict[int, weakref.ref] = {}
        self._log: list[tuple[int, Storage]] = []
        """(bytes more or less, storage), in the order of events."""

    def __len__(self) -> int:
        """Events so far: a moment."""
        return len(self._log)

    def born(self, tensor: Tensor, operator: str, phase: str, component: str | None = None) -> None:
        """Takes note of a tensor on the device, unless its storage is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = rounded(storage.nbytes())
        entry = Storage(size, operator, tuple(tensor.shape), str(tensor.dtype)[6:], phase, component)
        self._live[key] = entry
        self._log.append((size, entry))
        self._references[key] = weakref.ref(storage, self._died(key))

    def _died(self, key: int) -> Callable[[weakref.ref], None]:
        def died(reference: weakref.ref) -> None:
            if self._references.get(key) is reference:
                del self._references[key]
                entry = self._live.pop(key)
                self._log.append((-entry.size, entry))

        return died

    def resized(self, tensor: Tensor, phase: str) -> None:
        """A storage has got more or less memory in place."""
        storage = tensor.untyped_storage()
        entry = self._live.get(storage._cdata)
        if entry is None:
            self.born(tensor, "resize_", phase)
            return
        size = rounded(storage.nbytes())
        if size != entry.size:  # as if it had died and another had been born
            self._log.append((-entry.size, entry))
            entry = Storage(size, entry.operator, entry.shape, entry.dtype, phase, entry.component)
            self._live[storage._cdata] = entry
            self._log.append((size, entry))

    def entry(self, tensor: Tensor) -> Storage | None:
        return self._live.get(tensor.untyped_storage()._cdata)

    def say(self, tensor: Tensor, component: str, override: bool = False) -> None:
        """What a tensor's storage is for."""
        entry = self.entry(tensor)
        if entry is not None and (override or entry.component is None):
            entry.component = component

    def say_of_those(self, phase: str, component: str) -> None:
        """What all live storages are for that were made in a phase, and of which nobody has said it."""
        for entry in self._live.values():
            if entry.phase == phase and entry.component is None:
                entry.component = component

    def live_bytes(self) -> int:
        return sum(entry.size for entry in self._live.values())

    def peak(self, begin: int, end: int | None = None) -> tuple[int, list[Storage]]:
        """The most bytes that were live at once between two moments, and what was live then."""
        total, most, at = 0, -1, 0
        for index, (change, _) in enumerate(self._log[:end]):
            total += change
            if index >= begin - 1 and total > most:
                most, at = total, index
        held: dict[int, Storage] = {}
        for change, entry in self._log[: at + 1]:
            if change >= 0:
                held[id(entry)] = entry
            else:
                held.pop(id(entry), None)
        return max(most, 0), list(held.values())


def rounded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK
