"""Optimizers whose groups have settings of their own, at construction and whenever one is added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from peft_pretraining.optim.low_rank import LowRankOptimizer

Completion = Callable[[Mapping[str, Any]], list[dict[str, Any]]]
"""Makes of a group the groups that it is to be. What it made it leaves as it is; it can be pickled."""


class OwnGroups(LowRankOptimizer):
    """Has each group completed: `complete` gives it what the method is, and divides it where that is several things."""

    def __init__(self, params: Iterable[Any], complete: Completion, **settings: Any):
        self._complete = complete
        super().__init__(as_groups(params), **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or the groups that it is divided into: all of them or none."""
        if not isinstance(param_group, dict) or isinstance(param_group["params"], set):
            return super().add_param_group(param_group)  # which refuses it
        groups, peers = len(self.param_groups), len(self._peers)
        try:
            for part in self._complete(param_group):
                super().add_param_group(part)
        except Exception:
            for param in (param for group in self.param_groups[groups:] for param in group["params"]):
                for known in (self.state, self._slots, self.subspaces):
                    known.pop(param, None)
            del self.param_groups[groups:], self._peers[peers:]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_complete": self._complete}


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """What an optimizer is given, as groups."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or groups, got a tensor")
    given = list(params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]


def divided(group: Mapping[str, Any], is_matrix: Callable[[Tensor], bool]) -> tuple[list[Any], list[Any]]:
    """A group's matrices and the others, with their names where they have some."""
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    matrices = [is_matrix(each[1] if isinstance(each, tuple) else each) for each in params]
    chosen = [each for each, is_one in zip(params, matrices, strict=True) if is_one]
    return chosen, [each for each, is_one in zip(params, matrices, strict=True) if not is_one]
