"""What the environment tells torch before it is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_OLDER = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names that older versions of torch have for it, and that newer ones still read."""


def set_up_allocator(environ: MutableMapping[str, str] | None = None) -> None:
    """Let torch's CUDA allocator grow its segments instead of making new ones for each size, unless the user has told
    it something, under whatever name.

    Gradients of many sizes are freed one by one, by per-layer updates above all: in segments of fixed sizes that leaves
    gaps, which count as reserved and are of no use. Call it before torch is imported.
    """
    environ = os.environ if environ is None else environ
    if not any(name in environ for name in (_ALLOCATOR, *_OLDER)):
        environ[_ALLOCATOR] = "expandable_segments:True"
