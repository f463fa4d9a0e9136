"""Attention within documents: what stands in one block with other documents is computed as if it stood alone.

A batch says by `position_ids` where its documents begin: each at position 0. From them follows, once per micro-batch
and for all layers, what each kind of attention wants. Flash attention, and `sdpa` on the CPU, take all tokens in one
row and the documents' ends in it, and never compute what a mask would throw away. Elsewhere, and in compiled layers,
which want the same shapes in every batch, `sdpa` takes a boolean mask, block-diagonal and causal. `eager` takes
nothing: transformers makes its mask of positions that begin anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def document_positions(input_ids: Tensor, end: int) -> Tensor:
    """Position of every token within its own document, (batch, length) int64; the token `end` is a document's last.

    A row begins a document anew, wherever the block that it is cut from began its own.

    >>> document_positions(torch.tensor([[5, 6, 1, 7, 8, 9], [1, 1, 5, 6, 7, 1]]), end=1).tolist()
    [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 3]]
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    follows_an_end = F.pad(input_ids[:, :-1] == end, (1, 0))
    begins = torch.where(follows_an_end, places, 0).cummax(1).values  # the place where a token's document begins
    return places - begins


def mask_of_documents(position_ids: Tensor) -> Tensor:
    """Which keys (last) a query may look at: those of its document up to itself. (batch, length) -> (batch, 1, length,
    length) bool, nowhere without a true one in a row.

    >>> mask_of_documents(torch.tensor([[0, 1, 0]])).int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    length = position_ids.shape[1]
    places = torch.arange(length, device=position_ids.device)
    begins = (places - position_ids)[:, None, :, None]  # where a query's document begins
    return (places >= begins) & (places <= places[:, None])


def documents_in_a_row(input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """A batch (batch, length) as flash attention's kernel for sequences of several lengths takes it: one row of all
    tokens, where each document ends in it, and the length of the longest.

    The host waits for a GPU once: how many documents there are decides about sizes.
    """
    positions = position_ids.reshape(1, -1)
    begins = (positions[0] == 0).nonzero()[:, 0].to(torch.int32)
    ends = F.pad(begins, (0, 1), value=positions.shape[1])  # (documents + 1,), the first of them 0
    longest = int(ends.diff().max())
    return {
        "input_ids": input_ids.reshape(1, -1),
        "position_ids": positions,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
