"""Hooks of the backward pass that keep nobody alive.

Autograd keeps hooks where no garbage collector looks: they must not refer to what refers to their parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


def weak_hook(arrives: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that calls a bound method with its parameter, as long as the method's object lives."""
    method = weakref.WeakMethod(arrives)

    def hook(param: Tensor) -> None:
        if (found := method()) is not None:
            found(param)

    return hook


def weak_end(ends: Callable[[bool], None]) -> Callable[[], None]:
    """What autograd calls at the end of a backward pass; a bound method is called by it, as `weak_hook` calls one.

    It is told whether this was a backward pass within another one, as with reentrant checkpointing.
    """
    method = weakref.WeakMethod(ends)

    def end() -> None:
        if (found := method()) is not None:
            found(torch._C._current_autograd_node() is not None)

    return end


def remove_all(handles: list[RemovableHandle]) -> None:
    """Take hooks off."""
    for handle in handles:
        handle.remove()
    handles.clear()
