"""Head and cross-entropy in one, over a few rows at a time: logits of a whole batch never exist.

Logits, their log-softmax and its gradient are three matrices of (tokens, vocabulary) in float32: at 60M weights, two
thirds of the memory of an update. Here the gradients are made in the forward pass, block by block, and each block of
logits is gone before the next one comes. Same arithmetic as the plain loss, but for the order of sums: float32 at
least for logits and softmax, float32 sums for the gradient of the head's weight, or one product for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_pretraining.models.loss import IGNORED

_LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**25}
"""Numbers of a block of logits, by device: 16 MB in float32 stay in the cache of a CPU, 128 MB fill a GPU."""

_PRODUCTS_AT_ONCE = 2**24
"""Numbers of a product in 16 bits on its way to the head's gradient: 32 MB."""


BlockLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of logits (rows, vocabulary) and targets (rows): the sum of the cross-entropies, and its gradient of the logits."""


def fused_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, block_loss: BlockLoss | None = None) -> Tensor:
    """Sum over all targets of the cross-entropy of `hidden @ weight.T`, in float32 at least; a scalar.

    `hidden` (..., d), `weight` (vocabulary, d), `labels` (...) with `IGNORED` where nothing counts. Products are in
    `hidden`'s dtype; a wider weight gets its gradient in its own. Can be differentiated once. `block_loss` is what
    blocks of logits go through, where gradients are wanted: `softmax_loss_`, or `softmax_loss` compiled.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return _loss_alone(hidden.flatten(0, -2), weight, labels.flatten())
    block_loss = block_loss or softmax_loss_
    total: Tensor = _FusedTokenLoss.apply(hidden.flatten(0, -2), weight, labels.flatten(), block_loss)
    return total


def softmax_loss_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A `BlockLoss` in float32 at least, whose gradient has the memory of the logits where these are as wide."""
    logits = logits.to(_wide(logits.dtype))
    counts = (targets != IGNORED).unsqueeze(1)
    places = targets.unsqueeze(1).where(counts, 0)
    # Softmax - one-hot, in the memory of the logits; 0 where nothing counts.
    chosen = logits.sub_(logits.amax(1, keepdim=True)).gather(1, places)
    sums = logits.exp_().sum(1, keepdim=True)
    loss = (sums.log() - chosen).masked_fill(~counts, 0.0).sum()
    return loss, logits.mul_(counts / sums).scatter_add_(1, places, -counts.to(logits.dtype))


def softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same `BlockLoss` for a compiler, which reads the logits twice and writes once: the gradient has the logits'
    dtype, and everything between is in float32 at least."""
    wide = logits.to(_wide(logits.dtype))
    counts = (targets != IGNORED).unsqueeze(1)
    places = targets.unsqueeze(1).where(counts, 0)
    shifted = wide - wide.amax(1, keepdim=True)
    sums = shifted.exp().sum(1, keepdim=True)
    loss = (sums.log() - shifted.gather(1, places)).masked_fill(~counts, 0.0).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == places
    gradient = (shifted.exp() / sums - is_target.to(wide.dtype)) * counts
    return loss, gradient.to(logits.dtype)


def _blocks(hidden: Tensor, weight: Tensor, labels: Tensor, even: bool = False) -> list[tuple[slice, Tensor]]:
    """Rows, and their labels, by blocks: as large as they may be, or of equal sizes."""
    rows = max(1, _LOGITS_AT_ONCE.get(hidden.device.type, 2**25) // weight.shape[0])
    if even:
        rows = math.ceil(len(hidden) / math.ceil(len(hidden) / rows))
    starts = range(0, hidden.shape[0], rows)
    return [(slice(start, start + rows), labels[start : start + rows]) for start in starts]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _loss_alone(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
    for rows, targets in _blocks(hidden, weight, labels):
        logits = F.linear(hidden[rows], weight.to(hidden.dtype)).to(total.dtype)
        total += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total


def _sums_in_place(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of a head in 16 bits is one product at the end, with the gradients of all logits in the
    memory that it will have itself: for up to d tokens they find room there, and no float32 sum is needed."""
    return weight.dtype == hidden.dtype != _wide(hidden.dtype) and len(hidden) <= hidden.shape[1]


def _multiply_in_place(of_logits: Tensor, hidden: Tensor) -> None:
    """(vocabulary, d) whose first columns are the gradients of logits, (vocabulary, tokens) -> their product with
    `hidden`, some rows at a time."""
    for rows in of_logits.split(max(1, _PRODUCTS_AT_ONCE // hidden.shape[1])):
        rows.copy_(rows[:, : len(hidden)] @ hidden)


def _add_product(of_weight: Tensor, gradient: Tensor, part: Tensor) -> None:
    """of_weight (vocabulary, d) += gradientᵀ part, some rows at a time: the product is in another dtype."""
    rows = max(1, _PRODUCTS_AT_ONCE // part.shape[1])
    for sums, columns in zip(of_weight.split(rows), gradient.split(rows, 1), strict=True):
        sums += columns.T @ part


class _FusedTokenLoss(torch.autograd.Function):
    """The loss, and in the same pass its gradients, which the backward pass multiplies by that of the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, block_loss: BlockLoss) -> Tensor:
        wide = _wide(hidden.dtype)
        total = hidden.new_zeros((), dtype=wide)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        at_the_end = ctx.needs_input_grad[1] and _sums_in_place(hidden, weight)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight) if at_the_end else torch.zeros_like(weight, dtype=wide)
        weight = weight.to(hidden.dtype)
        for rows, targets in _blocks(hidden, weight, labels, even=block_loss is not softmax_loss_):
            part = hidden[rows]
            # (rows, d) @ (d, vocabulary) -> (rows, vocabulary)
            loss, gradient = block_loss(F.linear(part, weight), targets)
            total += loss
            if at_the_end and of_weight is not None:
                gradient = of_weight[:, : len(hidden)][:, rows].copy_(gradient.T).T
            else:
                gradient = gradient.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(gradient, weight, out=of_hidden[rows])
            if of_weight is not None and not at_the_end:
                if wide == hidden.dtype:
                    of_weight.addmm_(gradient.T, part)
                else:
                    _add_product(of_weight, gradient, part)
            del loss, gradient  # before the next block's are made
        if at_the_end and of_weight is not None:
            _multiply_in_place(of_weight, hidden)
        ctx.gradients = (of_hidden, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss can be differentiated once")
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        if of_hidden is not None:
            of_hidden.mul_(grad_output.to(of_hidden.dtype))
        if of_weight is not None:
            of_weight.mul_(grad_output.to(of_weight.dtype))
        return of_hidden, of_weight, None, None
