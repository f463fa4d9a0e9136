"""The loss of next-token prediction, as a sum over target tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from peft_pretraining.models.causal_attention import attention_of, is_maskless, nothing_masked
from peft_pretraining.models.compiled import compilation_of
from peft_pretraining.models.document_mask import documents_in_a_row, mask_of_documents

IGNORED = -100
"""Label of positions that do not count (padding)."""

Batch = dict[str, torch.Tensor]
"""`input_ids` (batch, length); optionally `labels`, `attention_mask` and `position_ids` of the same shape. Without
labels every token is its own label. A mask is of what fills up short sequences behind their last token. Positions are
those within documents that are kept apart: each begins at 0."""


def count_targets(batch: Batch) -> int:
    """Number of tokens that a batch predicts: all but each sequence's first and the ignored ones."""
    labels = batch.get("labels")
    if labels is None:
        sequences, length = batch["input_ids"].shape
        return sequences * (length - 1)
    return int((labels[:, 1:] != IGNORED).sum())


def token_loss_sum(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the cross-entropies of a batch's target tokens, in float32 at least; a scalar.

    Of a model with `fused_loss`, which then makes it without logits of the whole batch.
    """
    input_ids = batch["input_ids"]
    # Shifting the labels instead of the logits avoids a copy of (batch, length, vocabulary).
    labels = F.pad(batch.get("labels", input_ids)[:, 1:], (0, 1), value=IGNORED)
    inputs = {**model_inputs(model, batch), "use_cache": False}
    labels = labels.view_as(inputs["input_ids"])
    if getattr(getattr(model, "module", model), "fused_loss", False):  # DDP's model is its module
        loss: torch.Tensor = model(**inputs, token_labels=labels)
        return loss
    logits = model(**inputs).logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def model_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """Tokens, and what attention is told of them."""
    input_ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None:
        return {"input_ids": input_ids, "attention_mask": _mask(model, batch)}
    attention = attention_of(model) or ""
    if attention.startswith("flash_attention"):
        return documents_in_a_row(input_ids, positions)
    if is_maskless(model) and input_ids.device.type == "cpu" and compilation_of(model) is None:
        return {**documents_in_a_row(input_ids, positions), "attention_mask": nothing_masked(input_ids.device)}
    mask = None if attention == "eager" else mask_of_documents(positions)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}


def _mask(model: torch.nn.Module, batch: Batch) -> torch.Tensor | None:
    """What attention is told of a batch. On the CPU, where a look at a mask costs nothing, short sequences keep the
    mask, and with it the rounding, that they have always had."""
    given, device = batch.get("attention_mask"), batch["input_ids"].device
    return nothing_masked(device) if is_maskless(model) and (given is None or device.type != "cpu") else given
