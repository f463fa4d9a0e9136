"""Updates that may have to leave no trace, of which nobody knows yet whether they must: masked on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LARGE = 2**24
"""Numbers of tensors that are worth a launch of their own."""


class Mask:
    """`found_inf` of one update, which is read later, if at all: 1.0 if the update must leave no trace, else 0.0.

    >>> mask, weight = Mask(torch.ones(())), torch.ones(2)
    >>> mask.scale_([weight], 0.9)  # decay that does not take place
    >>> weight, mask.choose(weight, weight * torch.nan), mask.zero_(torch.full((2,), torch.nan))
    (tensor([1., 1.]), tensor([1., 1.]), tensor([0., 0.]))

    What the host does meanwhile (`undo`) is taken back by `settle`, once somebody knows.
    """

    def __init__(self, found_inf: Tensor):
        self._flag = found_inf.detach().to(torch.float32)
        self._made: dict[Any, Tensor] = {}
        self._undo: list[Callable[[], object]] = []

    def _once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def found_inf(self, device: torch.device) -> Tensor:
        """The flag on a device, as torch's fused optimizers take it."""
        return self._once(device, lambda: self._flag.to(device, non_blocking=True))

    def skipped(self, device: torch.device) -> Tensor:
        """The flag on a device as a boolean."""
        return self._once((device, bool), lambda: self.found_inf(device) != 0)

    def choose(self, old: Tensor, new: Tensor) -> Tensor:
        """`old` if the update must leave no trace, else `new`, whatever that contains."""
        return torch.where(self.skipped(new.device), old, new)

    def zeroed(self, new: Tensor) -> Tensor:
        """Zeros if the update must leave no trace, else `new`, whatever that contains."""
        zero = self._once((new.device, new.dtype, 0), lambda: new.new_zeros(()))
        return torch.where(self.skipped(new.device), zero, new)

    def zero_(self, tensor: Tensor) -> Tensor:
        """Zeros in its place if the update must leave no trace."""
        return tensor.masked_fill_(self.skipped(tensor.device), 0)

    @contextmanager
    def guarding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """What changes in place inside this context changes back if the update must leave no trace. There is room for
        another two of small tensors meanwhile, which are copied together, and for another one of large ones."""
        large = [tensor for tensor in tensors if tensor.numel() >= _LARGE]
        copies = [tensor.clone() for tensor in large]
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() < _LARGE:
                kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        before = [torch.cat([tensor.reshape(-1) for tensor in alike]) for alike in kinds.values()]
        yield
        for tensor, copy in zip(large, copies, strict=True):
            torch.where(self.skipped(tensor.device), copy, tensor, out=tensor)
        for old, alike in zip(before, kinds.values(), strict=True):
            chosen = self.choose(old, torch.cat([tensor.reshape(-1) for tensor in alike]))
            parts = torch.split(chosen, [tensor.numel() for tensor in alike])
            torch._foreach_copy_(alike, [part.view(each.shape) for part, each in zip(parts, alike, strict=True)])

    def scale_(self, tensors: Sequence[Tensor], factor: float) -> None:
        """Multiplies tensors of one device and dtype, unless the update must leave no trace. In 32 bits and more the
        bits are those of a plain product."""
        device, dtype = tensors[0].device, tensors[0].dtype
        narrow = dtype.itemsize < 4

        def kept() -> Tensor:
            value = 1.0 if narrow else factor
            return torch.full((), value, device=device, dtype=dtype).masked_fill_(self.skipped(device), 1.0 - narrow)

        multiplier = self._once((device, dtype, 1.0 if narrow else factor), kept)
        if not narrow:
            torch._foreach_mul_(list(tensors), multiplier)
            return
        for tensor in tensors:  # in 16 bits the factor itself would be rounded to 1
            tensor.addcmul_(tensor, multiplier, value=factor - 1)

    # What the host counts.

    def undo(self, action: Callable[[], object]) -> None:
        """Something to do if the update turns out to leave no trace."""
        self._undo.append(action)

    def settle(self, skipped: bool | None = None) -> None:
        """The update has taken place, or was `skipped`; None reads the flag."""
        if self._undo and (bool(self._flag) if skipped is None else skipped):
            for action in reversed(self._undo):
                action()
        self._undo.clear()


def count(counters: Sequence[Tensor], mask: Mask | None) -> None:
    """Adds 1 to each: for good, or until the mask is settled."""
    torch._foreach_add_(list(counters), 1)
    if mask is not None:
        mask.undo(lambda: torch._foreach_sub_(list(counters), 1))


def set_counters(counters: Sequence[Tensor], value: int, mask: Mask | None) -> None:
    """Gives all of them, which are equal and on the host, a value: for good, or until the mask is settled."""
    if not counters:
        return
    if mask is not None:
        before = int(counters[0])
        mask.undo(lambda: [each.fill_(before) for each in counters])
    for each in counters:
        each.fill_(value)
