"""Float32 products in full, where the rest of a run takes TF32.

TF32 keeps 10 bits of each factor: enough for a layer's product, not for a basis, whose vectors would be orthonormal to
three digits, nor for a merge, which stays in the weight for good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_FULL = ("ieee", "none")


@contextlib.contextmanager
def full_float32_products(wanted: bool = True) -> Iterator[None]:
    """No TF32 in CUDA's float32 products inside this context, if `wanted`; what was set before holds afterwards.

    Reads and writes the setting of matrix products alone (`torch.backends.cuda.matmul`), which both ways of setting it,
    by `torch.set_float32_matmul_precision` and directly, agree in.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if not wanted or before in _FULL:
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
