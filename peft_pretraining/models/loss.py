"""The loss of next-token prediction, as a sum over target tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_pretraining.models.causal_attention import is_maskless, nothing_masked

IGNORED = -100
"""Label of positions that do not count (padding)."""

Batch = dict[str, torch.Tensor]
"""`input_ids` (batch, length); optionally `labels` and `attention_mask` of the same shape. Without labels every token
is its own label. A mask is of what fills up short sequences behind their last token."""


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
    inputs = {"input_ids": input_ids, "attention_mask": _mask(model, batch), "use_cache": False}
    if getattr(getattr(model, "module", model), "fused_loss", False):  # DDP's model is its module
        loss: torch.Tensor = model(**inputs, token_labels=labels)
        return loss
    logits = model(**inputs).logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _mask(model: torch.nn.Module, batch: Batch) -> torch.Tensor | None:
    """What attention is told of a batch. On the CPU, where a look at a mask costs nothing, short sequences keep the
    mask, and with it the rounding, that they have always had."""
    given, device = batch.get("attention_mask"), batch["input_ids"].device
    return nothing_masked(device) if is_maskless(model) and (given is None or device.type != "cpu") else given
