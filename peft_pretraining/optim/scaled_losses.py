"""Loss scaling beside updates inside the backward pass: refused, because nobody could take the scale out in time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Moving(Protocol):
    """What moves parameters inside the backward pass."""

    @property
    def parameters(self) -> set[Tensor]: ...


_moving: weakref.WeakSet[Moving] = weakref.WeakSet()
_scale: Callable[..., Any] = torch.amp.GradScaler.scale


def watch(moving: Moving) -> None:
    """Raise `RuntimeError` from now on where `GradScaler` is given a loss of these parameters.

    A scaler meets the optimizer only in `scaler.step`, when the weights would have moved by gradients that are
    thousands of times too large. `scale` is the last call before that.
    """
    _moving.add(moving)
    setattr(torch.amp.GradScaler, "scale", _checked_scale)  # noqa: B010 - type checkers take a method for constant


def forget(moving: Moving) -> None:
    """Undo `watch`."""
    _moving.discard(moving)
    if not _moving:
        setattr(torch.amp.GradScaler, "scale", _scale)  # noqa: B010


def _checked_scale(scaler: torch.amp.GradScaler, outputs: Any) -> Any:
    if scaler.is_enabled():
        moved = {param for moving in _moving for param in moving.parameters}
        for output in (
            [outputs] if isinstance(outputs, Tensor) else outputs if isinstance(outputs, (list, tuple)) else ()
        ):
            if moved and not moved.isdisjoint(_leaves(output)):
                raise RuntimeError(
                    "GradScaler does not go with per-layer updates: they move weights inside the backward pass, by "
                    "gradients that are still scaled; train in bfloat16, or close() them"
                )
    return _scale(scaler, outputs)


def _leaves(output: Tensor) -> Iterable[Tensor]:
    """The leaves that a backward pass from `output` reaches."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        waiting.extend(following for following, _ in node.next_functions)
