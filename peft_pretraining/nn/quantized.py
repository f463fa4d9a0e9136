"""A frozen weight kept in 4 or 8 bits by bitsandbytes' block-wise routines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK_4BIT = 64
_BLOCK_8BIT = 256


class QuantizedWeight(nn.Module):
    """A matrix as codes and one constant per block; everything is a buffer, so it is saved like any tensor.

    4bit: NF4 in blocks of 64 (Dettmers et al., arXiv 2305.14314); `double_quant` keeps the blocks' constants in 8 bits.
    8bit: dynamic 8-bit in blocks of 256 (arXiv 2110.02861).
    """

    codes: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor

    def __init__(self, dense: Tensor, kind: str, double_quant: bool = False):
        super().__init__()
        if kind not in ("4bit", "8bit"):
            raise ValueError(f"quantize must be 4bit or 8bit, got {kind!r}")
        if double_quant and kind != "4bit":
            raise ValueError("use_double_quant needs quantize 4bit")
        self.kind, self.double_quant = kind, double_quant
        self.shape, self.dtype = dense.shape, dense.dtype
        for name, tensor in self._quantize(dense).items():
            self.register_buffer(name, tensor)

    @torch.no_grad()
    def assign(self, dense: Tensor) -> None:
        """Quantise another matrix of the same shape, in place."""
        for name, tensor in self._quantize(dense).items():
            getattr(self, name).copy_(tensor)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The matrix (m, n) that is represented, in the model's dtype."""
        import bitsandbytes.functional as bnb

        if self.kind == "8bit":
            flat = bnb.dequantize_blockwise(self.codes, absmax=self.absmax, code=self.code, blocksize=_BLOCK_8BIT)
            return flat.to(self.dtype).reshape(self.shape)
        absmax = self.absmax
        if self.double_quant:
            absmax = bnb.dequantize_blockwise(
                self.absmax, absmax=self.nested_absmax, code=self.nested_code, blocksize=_BLOCK_8BIT
            )
            absmax = absmax + self.offset
        state = bnb.QuantState(
            absmax=absmax,
            shape=(self.shape.numel(),),
            dtype=torch.float32 if self.dtype == torch.float64 else self.dtype,  # bitsandbytes knows no float64
            blocksize=_BLOCK_4BIT,
            code=self.code,
            quant_type="nf4",
        )
        return bnb.dequantize_4bit(self.codes, quant_state=state).to(self.dtype).reshape(self.shape)

    def _quantize(self, dense: Tensor) -> dict[str, Tensor]:
        import bitsandbytes.functional as bnb

        # Flat: on the CPU bitsandbytes mixes up the blocks of a matrix whose rows are shorter than one.
        dense = dense.to(torch.float32).flatten()
        if self.kind == "8bit":
            codes, state = bnb.quantize_blockwise(dense, blocksize=_BLOCK_8BIT)
            return {"codes": codes, "absmax": state.absmax, "code": state.code}
        codes, state = bnb.quantize_4bit(
            dense, blocksize=_BLOCK_4BIT, quant_type="nf4", compress_statistics=self.double_quant
        )
        parts = {"codes": codes, "absmax": state.absmax, "code": state.code}
        if self.double_quant:
            nested = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
            parts |= {**nested, "offset": state.offset}
        return parts
