"""Watches what torch does on the meta device as if it were a GPU: memory, launches, waits, collectives, work.

The meta device computes shapes alone, so an update of LLaMA 7B takes seconds and no memory; but the operators that it
dispatches are those of a real update, and storages are born and die when they would.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from peft_pretraining.report.footprint import work
from peft_pretraining.report.footprint.collectives import done, exchange_of
from peft_pretraining.report.footprint.counters import Counts
from peft_pretraining.report.footprint.small_values import SmallValues
from peft_pretraining.report.footprint.storages import Storages

LARGE = 2**16
"""Numbers beyond which nothing is computed on the CPU: nobody looks at them."""
_WITHOUT_KERNEL = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("_unsafe_view", "_reshape_alias", "is_pinned", "resize_", "set_", "_local_scalar_dense", "is_same_size"),
}
_RANDOM = ("rand", "normal", "randn", "randint", "randperm", "bernoulli", "uniform", "exponential")
_WITH_LOGITS = ("forward", "backward", "evaluation")
_PACKAGE = "peft_pretraining"


@dataclass
class _Operator:
    """What is known of an operator once for all."""

    name: str
    is_view: bool
    """Its results share memory with its inputs."""
    changes: bool
    """It changes an input."""
    is_collective: bool
    launches: bool


class Tracker(TorchDispatchMode):
    """A device in the making: `storages`, `counts`, and the `phase` that the update is in."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.values, self.counts = Storages(), SmallValues(), Counts()
        self.phase = "before"
        self.vocabulary: int | None = None
        """By which logits are told from other tensors."""
        self._known: dict[Any, _Operator] = {}
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        if any(each is not Tensor and each is not nn.Parameter for each in types):
            return NotImplemented  # a tensor of tensors, whose operators come by one by one
        kwargs = kwargs or {}
        operator = self._known.get(func) or self._look_at(func)
        if operator.is_collective:
            return self._collective(func, operator, args, kwargs)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(each.is_meta for each in inputs):
            if (answer := self._copy_between_devices(operator.name, args, kwargs)) is not None:
                return answer
        elif not _makes_on_device(kwargs):
            return self._on_cpu(func, operator, inputs, args, kwargs)
        elif inputs:
            self._copied_to_device(kwargs.get("non_blocking", False))
        return self._on_device(func, operator, inputs, args, kwargs)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile happens on no device."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _look_at(self, func: Any) -> _Operator:
        schema, name = func._schema, func._opname
        aliases = [each.alias_info for each in schema.returns if each.alias_info is not None]
        view = bool(aliases) and not any(each.is_write for each in aliases) and not schema.is_mutable
        collective = func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd")
        launches = not view and name not in _WITHOUT_KERNEL and not collective
        self._known[func] = found = _Operator(name, view, schema.is_mutable, collective, launches)
        return found

    def now(self) -> str:
        """The phase: a backward pass tells itself."""
        if self.phase == "forward" and torch._C._current_graph_task_id() != -1:
            return "backward"
        return self.phase

    def _on_device(self, func: Any, operator: _Operator, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        out, phase = func(*args, **kwargs), self.now()
        outs = [out] if isinstance(out, Tensor) else [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if operator.is_view:
            return out
        outs = [each for each in outs if each.is_meta]
        if operator.name in ("index", "nonzero", "masked_select") and _reads_back(operator.name, inputs):
            self.wait("indices of unknown number")
        if operator.launches:
            self.counts.operators[phase, operator.name] += 1
            self.counts.kernels[work.kernel(func, operator.name, phase, inputs, outs, args, kwargs)] += 1
        for each in outs:
            self.storages.born(each, operator.name, phase, self._component(each, phase))
        if operator.name == "resize_":
            self.storages.resized(args[0], phase)
        self.values.follow(func, args, kwargs, outs, inputs, "empty" in operator.name)
        return out

    def _component(self, tensor: Tensor, phase: str) -> str | None:
        """What a new tensor is for, as far as it can be told at once."""
        if phase in _WITH_LOGITS and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
            return "logits"
        if phase == "backward" and torch.is_grad_enabled():
            return "activations"  # recomputed
        return "activations" if phase in ("forward", "evaluation") else None

    # The host and the device.

    def wait(self, why: str) -> None:
        """The host waits for the device."""
        self.counts.waits[self.now(), f"{_place()}: {why}"] += 1

    def _copied_to_device(self, non_blocking: bool) -> None:
        if not non_blocking:
            self.wait("copied to the device")

    def _copy_between_devices(self, name: str, args: Any, kwargs: Any) -> Any:
        """What is read from the device, or None if nothing is."""
        if name == "_local_scalar_dense":
            self.wait("a number is read")
            return self.values.read(args[0]).item()
        if name == "_to_copy" and _is_cpu(kwargs.get("device")):
            if not kwargs.get("non_blocking"):
                self.wait("copied to the host")
            return self.values.read(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and not args[0].is_meta:
            if not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
                self.wait("copied to the host")
            if args[0].numel() <= LARGE:
                found = self.values.twin(args[1])
                return args[0] if found is None else args[0].copy_(found)
            return args[0]
        if name == "copy_" and not args[1].is_meta:
            self._copied_to_device((len(args) > 2 and args[2]) or kwargs.get("non_blocking", False))
            self.values.write(args[0], args[1])
            self.counts.operators[self.now(), "copy_"] += 1
            return args[0]
        return None

    def _on_cpu(self, func: Any, operator: _Operator, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Large tensors get memory, which nobody touches, but no numbers."""
        random = operator.name.strip("_").startswith(_RANDOM)
        if not inputs and random:
            device = {**kwargs, "device": torch.device("meta"), "generator": None}
            device = {key: value for key, value in device.items() if value is not None or key in kwargs}
            return _untouched(func(*args, **device)) if _product(args) > LARGE else func(*args, **kwargs)
        if operator.is_view or not any(each.numel() > LARGE for each in inputs):
            return func(*args, **kwargs)
        if operator.changes:
            return args[0]
        if operator.name == "_local_scalar_dense" or operator.name.startswith(("empty", "zeros", "new_", "_to_copy")):
            return func(*args, **kwargs)
        moved = tree_map_only(Tensor, lambda each: torch.empty_like(each, device="meta"), (args, kwargs))
        return tree_map_only(Tensor, _untouched, func(*moved[0], **moved[1]))

    # Collectives.

    def _collective(self, func: Any, operator: _Operator, args: Any, kwargs: Any) -> Any:
        out = None
        if func.namespace != "c10d":
            out = func(*args, **kwargs)
        leaves = [each for each in tree_leaves((args, out)) if isinstance(each, Tensor)]
        found = exchange_of(operator.name, self.now(), args, leaves)
        if found is not None and any(each.is_meta for each in leaves):
            self.counts.exchanges[found] += 1
        if func.namespace != "c10d":
            for each in leaves:
                if each.is_meta:
                    self.storages.born(each, operator.name, self.now())
            return out
        tensors = [each for each in tree_leaves(args[0]) if isinstance(each, Tensor)]
        if found is not None and found.kind in ("all_gather", "reduce_scatter"):
            for each in leaves:
                if each.is_meta:
                    what = "gathered weights" if found.kind == "all_gather" else "gradients"
                    self.storages.say(each, what, override=each.ndim == 1)
        handle = done(tensors)
        return (args[0], handle) if len(func._schema.returns) > 1 else handle


def _makes_on_device(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _reads_back(name: str, inputs: list[Tensor]) -> bool:
    return name != "index" or any(each.dtype == torch.bool for each in inputs[1:])


def _product(args: Any) -> int:
    numbers = 1
    for each in tree_leaves(args):
        if isinstance(each, int):
            numbers *= max(each, 1)
    return numbers


def _untouched(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _place() -> str:
    """Where in the project's code this happens."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if f"/{_PACKAGE}/" in file and "/report/" not in file:
            return f"{file.rpartition(f'/{_PACKAGE}/')[2]} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"
