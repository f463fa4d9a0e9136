"""What one operator costs a device: multiplications, and bytes read and written."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from peft_pretraining.report.footprint.counters import Kernel

_DECOMPOSITIONS = ("eigh", "svd", "qr", "cholesky", "triangular")
_IN_PLACE_PRODUCTS = {"addmm_": 1, "baddbmm_": 1}
"""Products that torch's registry of FLOPs does not know, with the place of the first factor."""


def kernel(
    func: Any, name: str, phase: str, inputs: list[Tensor], outs: list[Tensor], args: Any, kwargs: Any
) -> Kernel:
    """What the operator `func`, which made `outs` of `inputs`, has to do."""
    moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outs))
    dtype = str(inputs[0].dtype if inputs else outs[0].dtype)[6:] if inputs or outs else "float32"
    if any(part in name for part in _DECOMPOSITIONS) and inputs and inputs[0].ndim >= 2:
        rows, columns = inputs[0].shape[-2:]
        kind = next(part for part in _DECOMPOSITIONS if part in name)
        return Kernel(phase, 0, moved, dtype, decomposition=(kind, rows, columns))
    flops = _flops(func, name, outs, args, kwargs)
    return Kernel(phase, flops, moved, dtype, not flops or all(map(_aligned, [*inputs, *outs])))


def _aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    steps = [step * size for step, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1 and step > 1]
    return tensor.ndim < 2 or all(step % 16 == 0 for step in steps)


def _bytes(tensor: Tensor) -> int:
    """Expanded tensors have less memory than entries."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(func: Any, name: str, outs: list[Tensor], args: Any, kwargs: Any) -> int:
    if name in _IN_PLACE_PRODUCTS:
        left, right = args[1], args[2]
        return 2 * left.numel() * right.shape[-1]
    counter = flop_registry.get(func._overloadpacket)
    if counter is None or not outs:
        return 0
    return int(counter(*args, **kwargs, out_val=outs[0] if len(outs) == 1 else tuple(outs)))
