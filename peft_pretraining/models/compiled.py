"""Decoder layers compiled by torch, in place and one by one: modules, parameters and state dicts stay what they are.

One layer by one because updates inside the backward pass need each layer's gradients as they come, FSDP2 gathers one
layer at a time, and what one layer is compiled to serves all others: their weights are inputs of the graph. A run has
two graphs, of training and of evaluation, for the shapes of their first batches. Any other shape, a last and smaller
batch, and whatever a layer does that was not traced (`runs_eagerly`), is computed eagerly instead of compiled again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from peft_pretraining.runtime.watchdog import COMPILE_FACTOR, watched

log = logging.getLogger("peft_pretraining")

BACKEND = "inductor"
"""Or another that `torch.compile` knows: for tests."""

_LATER = "eager_on_recompile"
"""Torch's stance once a layer has its graph."""


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device on this machine, in words; None where it can.

    >>> why_not(torch.device("meta"))
    'there is no compiler for the device meta'
    """
    if device.type not in ("cpu", "cuda"):
        return f"there is no compiler for the device {device.type}"
    if device.type == "cuda" and not _finds_triton():
        return "triton is not installed, or does not know this GPU"
    if device.type == "cpu" or torch.version.hip is None:  # triton, too, builds its launcher by a C compiler
        return _without_host_compiler()
    return None


def _finds_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


def _without_host_compiler() -> str | None:
    """Inductor's own search, which tries what `CXX` names, and g++."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = get_cpp_compiler()
    except InvalidCxxCompiler:
        found = None
    return None if found and shutil.which(found) else "there is no C++ compiler (g++, or what CXX names)"


class Compilation:
    """What the compiled parts of one model share: how they are compiled, and what that took."""

    def __init__(self) -> None:
        self.compilations = 0
        """Graphs that were made: each for all layers of one kind."""
        self.seconds = 0.0
        """What that took, the first passes through them included."""
        self.failed = False
        """Whether something could not be compiled; then everything runs eagerly."""
        self._reported = 0
        self._shapes: dict[tuple[object, bool], tuple[Any, ...]] = {}
        self.forward = self.compiled(_forward)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function with graphs of its own, each for one set of shapes, of all that it does."""
        # Torch keeps graphs, and counts them against its limit, by code object: other models have their own.
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        compiled: Callable[..., Any] = torch.compile(own, backend=self._compile, fullgraph=True, dynamic=False)
        return compiled

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(BACKEND)(graph, inputs)
        return compiled

    def takes(self, kind: object, shapes: tuple[Any, ...] | None) -> bool:
        """Whether these shapes are those that something is compiled for, with or without gradients: the first ones."""
        if self.failed or shapes is None:
            return False
        return self._shapes.setdefault((kind, torch.is_grad_enabled()), shapes) == shapes

    @watched("compiling a layer", COMPILE_FACTOR)
    def first(
        self, what: str, compiled: Callable[..., Any], eager: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The first call of something compiled, which makes its graph, if none that there is fits. Eagerly where that
        fails."""
        before, began = self.compilations, time.perf_counter()
        try:
            with _when_compiling():
                result = compiled(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, AssertionError) as error:  # the latter of a kernel's result
            self.failed = True
            log.warning("%s cannot be compiled, the model runs eagerly: %s", what, _reason(error))
            return eager(*args, **kwargs)
        if self.compilations > before:
            seconds = time.perf_counter() - began
            self.seconds += seconds
            log.info("compiled %s in %.1f s", what, seconds)
        return result

    def news(self) -> dict[str, float]:
        """What has been compiled, for the log of a run, if some of it is new since it was asked for last."""
        if self.compilations == self._reported:
            return {}
        self._reported = self.compilations
        return {"compilations": self.compilations, "compile_seconds": self.seconds}


def _forward(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(part).forward(part, *args, **kwargs)


@contextlib.contextmanager
def _when_compiling() -> Iterator[None]:
    """Torch's settings while a layer is compiled."""
    from torch._inductor import config as inductor

    settings: dict[str, Any] = {"fallback_random": True}  # dropout draws what it would eagerly
    if torch.are_deterministic_algorithms_enabled():
        # Kernels whose sums differ in their order are not chosen by timing, which depends on what a cache holds.
        settings |= {"deterministic": True, "force_shape_pad": True}
    with contextlib.ExitStack() as stack:
        # DDP's buckets would cut a layer's graph; autograd passes its gradients on layer by layer anyway.
        stack.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
        # So that all of it is seen, timed and watched here.
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        known = {name: value for name, value in settings.items() if hasattr(inductor, name)}  # not in all versions
        stack.enter_context(inductor.patch(known))
        yield


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


class CompiledForward:
    """Stands for the `forward` of one part of a model: in the part's own attributes, so that hooks stay around it."""

    def __init__(self, part: nn.Module, shared: Compilation):
        self._part, self.shared = part, shared
        self._seen: set[bool] = set()
        """With and without gradients."""
        self._watched: list[Any] | None = None
        """Modules that say what they do; known at the first call, since methods change layers after they are built."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part, shared, grad = self._part, self.shared, torch.is_grad_enabled()
        if self._watched is None:
            self._watched = [module for module in part.modules() if hasattr(type(module), "runs_eagerly")]
        if (
            part.training != grad
            or any(module.runs_eagerly for module in self._watched)
            or not shared.takes(type(part), _shapes(args, kwargs))
        ):
            return _forward(part, *args, **kwargs)
        if args and isinstance(args[0], Tensor):
            args = (_alike(args[0], grad), *args[1:])
        if grad not in self._seen:
            self._seen.add(grad)
            what = f"{type(part).__name__.removeprefix('FSDP')} for {'training' if grad else 'evaluation'}"
            return shared.first(what, shared.forward, _forward, part, *args, **kwargs)
        with torch.compiler.set_stance(_LATER):
            return shared.forward(part, *args, **kwargs)


class CompiledFunction:
    """A function of tensors that is compiled for the shapes of its first call; with others `otherwise` is called."""

    def __init__(self, function: Callable[..., Any], otherwise: Callable[..., Any], shared: Compilation):
        self._function, self._otherwise, self._shared = function, otherwise, shared
        self._compiled = shared.compiled(function)
        self._begun = False

    def __call__(self, *tensors: Tensor) -> Any:
        if not self._shared.takes(self._function, _shapes(tensors, {})):
            return self._otherwise(*tensors)
        if not self._begun:
            self._begun = True
            what = self._function.__name__.replace("_", " ")
            return self._shared.first(what, self._compiled, self._otherwise, *tensors)
        with torch.compiler.set_stance(_LATER):
            return self._compiled(*tensors)


def _alike(hidden: Tensor, grad: bool) -> Tensor:
    """What comes from an embedding that is frozen, or from one that asks for gradients in an evaluation, as what comes
    from another layer."""
    if hidden.requires_grad == grad:
        return hidden
    return hidden.detach().requires_grad_(grad)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What a graph is made for; None for what is not compiled at all: a cache that is written to."""
    if kwargs.get("past_key_values") is not None:
        return None
    found: list[Any] = [torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")]
    for value in (*args, *kwargs.values()):
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Tensor):
                found.append((each.shape, each.dtype, each.device))
            elif each is None or isinstance(each, (bool, int, float, str)):
                found.append(each)
    return tuple(found)


def compile_layers(model: nn.Module) -> Compilation:
    """Let a LLaMA's decoder layers run compiled, from their first passes on. To be called when the model is built and
    sharded, before DDP wraps it.

    A layer of which FSDP2 gathers some parameters apart is compiled in parts, between its hooks.
    """
    shared = Compilation()
    for layer in model.get_submodule("model.layers").children():
        for part in _parts(layer):
            vars(part)["forward"] = CompiledForward(part, shared)
    return shared


def _parts(layer: nn.Module) -> list[nn.Module]:
    if not any(isinstance(module, FSDPModule) for module in layer.modules() if module is not layer):
        return [layer]
    return [child for child in layer.children() if not any(isinstance(each, FSDPModule) for each in child.modules())]


def compilation_of(model: nn.Module) -> Compilation | None:
    """What `compile_layers` made for a model; None if it was not called."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, CompiledForward):
            return forward.shared
    return None
