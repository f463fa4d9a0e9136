"""Evaluation: the token-weighted loss on a fixed part of the validation set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from peft_pretraining.data.shards import DataError
from peft_pretraining.distributed import ProcessGroup, free_gathered_weights
from peft_pretraining.models.loss import Batch, count_targets, token_loss_sum
from peft_pretraining.runtime.watchdog import FIRST_UPDATE_FACTOR, goes_on, watched

_BATCHES_BETWEEN_STOP_CHECKS = 20


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy per target token, in nats; NaN without any."""
    tokens: int
    """Target tokens."""

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss >= 700 else math.exp(self.loss)


@watched("an evaluation's batch", FIRST_UPDATE_FACTOR)
@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch | None], group: ProcessGroup, should_stop: Callable[[], bool]
) -> Evaluation | None:
    """Sum of token losses over number of tokens, over all ranks, divided once at the end.

    `batches` has the same length on every rank (None where this one has nothing to do). Every few batches
    `should_stop`, which must answer alike on all ranks, may end the evaluation: None is returned. `DataError` where
    there is not a single target.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=group.device)  # loss sum, tokens
    try:
        for index, batch in enumerate(batches):
            goes_on()
            if index % _BATCHES_BETWEEN_STOP_CHECKS == 0 and should_stop():
                return None
            if batch is None:  # a sharded model gathers its weights on all ranks at once
                token_loss_sum(model, {"input_ids": torch.zeros(1, 2, dtype=torch.int64, device=group.device)})
                continue
            tokens = count_targets(batch)
            batch = {name: tensor.to(group.device, non_blocking=True) for name, tensor in batch.items()}
            totals[0] += token_loss_sum(model, batch).double()
            totals[1] += tokens
    finally:
        free_gathered_weights(model)
        model.train(was_training)
    loss_sum, tokens = group.all_reduce_sum(totals).tolist()
    if not tokens:
        raise DataError("the evaluation set holds nothing to predict: no sequence of it has two tokens")
    return Evaluation(loss_sum / tokens, int(tokens))
