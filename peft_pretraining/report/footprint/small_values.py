"""Values of the small tensors of a simulated device: what the code reads back, and decides by.

A tensor on the meta device has no numbers. Those of a handful of entries get a twin on the CPU, with which whatever is
done to them is done, too; what is reduced from a large tensor is all right: true, finite, 1.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

LARGEST = 512
"""Bytes of a storage that has a twin; of one that is made of nothing but storages with twins (flags of all layers in
one tensor), `LARGEST_MADE`."""
LARGEST_MADE = 2**15


class SmallValues:
    """Twins of small storages, by their identity."""

    def __init__(self) -> None:
        self._twins: dict[int, tuple[weakref.ref, torch.UntypedStorage]] = {}

    def twin(self, tensor: Tensor) -> Tensor | None:
        """The CPU's tensor with the values of one on the device, over the same memory as those of its views."""
        found = self._twins.get(tensor.untyped_storage()._cdata)
        if found is None or found[0]() is None:
            return None
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(found[1], tensor.storage_offset(), tensor.shape, tensor.stride())

    def read(self, tensor: Tensor) -> Tensor:
        """Its values, or where nobody knows them those of something harmless."""
        found = self.twin(tensor)
        if found is not None:
            return found.clone()
        if tensor.numel() > LARGEST:
            return torch.empty(tensor.shape, dtype=tensor.dtype)  # memory that nobody touches
        return torch.full(tensor.shape, harmless(tensor.dtype), dtype=tensor.dtype)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        twin = self.twin(tensor)
        if twin is not None:
            twin.copy_(values)

    def follow(
        self, function: Any, args: tuple, kwargs: dict, outs: list[Tensor], inputs: list[Tensor], unset: bool
    ) -> None:
        """Do to the twins what was done on the device. `outs` are its results, some of them inputs changed in place;
        `unset`: they have no values yet."""
        on_device = [each for each in inputs if each.is_meta]
        known = bool(on_device) and all(self.twin(each) is not None for each in on_device)
        limit = LARGEST_MADE if known else LARGEST
        small = {id(out): out for out in outs if out.untyped_storage().nbytes() <= limit}
        if not small:
            return
        new = {each for each, out in small.items() if self.twin(out) is None}
        for each in new:
            storage = small[each].untyped_storage()
            memory = torch.zeros(storage.nbytes(), dtype=torch.uint8).untyped_storage()
            self._twins[storage._cdata] = (weakref.ref(storage), memory)
        results = self._computed(function, args, kwargs) if not unset and (known or not on_device) else None
        for place, out in enumerate(outs):
            if id(out) not in small:
                continue
            twin = self.twin(out)
            assert twin is not None
            if results is None:
                twin.fill_(harmless(out.dtype))
            elif id(out) in new:  # others were changed in place
                twin.copy_(results[place])

    def _computed(self, function: Any, args: tuple, kwargs: dict) -> list[Tensor] | None:
        """The results on the CPU; None where it cannot do that."""
        try:
            moved = tree_map_only(Tensor, lambda each: self.twin(each) if each.is_meta else each, (args, kwargs))
            on_cpu = {**moved[1], "device": torch.device("cpu")} if kwargs.get("device") is not None else moved[1]
            result = function(*moved[0], **on_cpu)
        except (RuntimeError, NotImplementedError, TypeError):
            return None
        return [result] if isinstance(result, Tensor) else [each for each in result or () if isinstance(each, Tensor)]


def harmless(dtype: torch.dtype) -> float | int | bool:
    """True, 0 (no failure, no overflow), 1.0."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 0
