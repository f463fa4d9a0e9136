"""Causal attention without a mask: nothing is made, and nothing read back from the device to find out whether one is.

transformers looks at the numbers of position ids, and of a padding mask, before it leaves a causal mask out; on a GPU
the host waits for both, in every forward pass. A batch of this package needs no mask unless documents are kept apart:
its sequences begin at their first token, and what fills up short ones stands behind them, where no real token looks.
`nothing_masked` says so. Any other mask, or none, takes transformers' own way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "causal_sdpa"
"""What the implementation is called in a model that is trained here; no saved configuration names it."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' `sdpa`, to which an empty mask is none. With `cu_seq_lens_q`, the documents' ends in one row of all
    tokens as flash attention takes them, each document by itself: nothing is computed that a mask would throw away."""
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask = None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    lengths = cu_seq_lens_q.diff().tolist()
    documents = zip(*(each.split(lengths, 2) for each in (query, key, value)), strict=True)  # (1, heads, tokens, d)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **settings)[0] for q, k, v in documents]
    return torch.cat(outputs, 1), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def make_maskless(model: PreTrainedModel) -> None:
    """Let a model whose attention is `sdpa` take `nothing_masked` for a mask."""
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = NAME


def attention_of(model: nn.Module) -> str | None:
    """The implementation of a model's attention; it may be wrapped, as for DDP. None where nothing names one."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def is_maskless(model: nn.Module) -> bool:
    """Whether a model takes `nothing_masked` for a mask."""
    return attention_of(model) == NAME


def nothing_masked(device: torch.device) -> Tensor:
    """The mask of sequences that begin at their first token: empty, and of four dimensions, at whose numbers
    transformers does not look."""
    return torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)
