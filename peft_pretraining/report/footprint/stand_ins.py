"""What torch, transformers and bitsandbytes would do on a GPU, done on the meta device: the few places that ask which
device they are on."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._device import _device_constructors

META = torch.device("meta")
PER_NODE = 8
"""Devices of one machine."""
_DEVICES = ["cpu", "cuda", "meta"]
_LISTS = ("_get_fused_kernels_supported_devices", "_get_foreach_kernels_supported_devices")
_WITH_LISTS = ("torch.optim.optimizer", "torch.optim.adam", "torch.optim.adamw", "torch.utils._foreach_utils")


@contextlib.contextmanager
def as_on_a_gpu(quantised: bool = False) -> Iterator[None]:
    """Attention by CUDA's kernels, fused optimizers, and bitsandbytes' kernels if `quantised`."""
    _device_constructors()  # which torch collects once: afterwards, `with torch.device(...)` would miss `torch.tensor`
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch, "meta", _handle(), create=True))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(patch.object(torch, "tensor", _tensor))
        stack.enter_context(patch.object(Tensor, "new_tensor", _new_tensor))
        for module in map(importlib.import_module, _WITH_LISTS):
            for name in _LISTS:
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, lambda: _DEVICES))
        if quantised:
            functional = importlib.import_module("bitsandbytes.functional")
            for name in ("is_on_gpu",):
                if hasattr(functional, name):
                    stack.enter_context(patch.object(functional, name, lambda *args, **kwargs: True))
        yield


_real_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
    """Numbers come to a device from the host, where they are known."""
    made: Tensor = _real_tensor(data, **settings)
    return made if device is None else made.to(device)


def _new_tensor(self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, **settings: Any) -> Tensor:
    return _tensor(data, dtype=dtype or self.dtype, device=device or self.device, **settings)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that CUDA takes: flash attention in 16 bits without a mask, else the memory-efficient one; neither
    knows float64."""
    aten: Any = torch.ops.aten
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(repeats, -3) for each in (key, value))
    if query.dtype == torch.float64:
        out: Tensor = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )[0]
    elif attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    else:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]
    return out


class _Event:
    """Something that has always happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> _Event:
        return self

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        """Not counted: what comes to the host by a copy that nobody waits for is there when it is looked at."""


class _Stream(_Event):
    """A queue of work that is done at once."""

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


def _handle() -> SimpleNamespace:
    """What torch asks a kind of device for."""
    return SimpleNamespace(
        Stream=_Stream,
        Event=_Event,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=lambda device=None: _Stream(),
        synchronize=lambda device=None: None,
        current_device=lambda: 0,
        device_count=lambda: PER_NODE,
        is_available=lambda: True,
        is_initialized=lambda: True,
        set_device=lambda device: None,
    )
