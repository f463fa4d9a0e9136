"""Evaluation: the token-weighted loss on a fixed part of the validation set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from peft_pretraining.data.data import EvaluationSet
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
    parts: tuple[Evaluation, ...] = ()
    """Of the batches 0, n, 2n ..., of 1, n + 1 ... and so on, where `evaluate` was asked for n parts above one."""

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss >= 700 else math.exp(self.loss)

    def described(self, bytes_per_token: float | None) -> dict[str, float]:
        """What is recorded; with bits per byte of text where it is known how many bytes a token stands for.

        >>> Evaluation(loss=math.log(16), tokens=10).described(bytes_per_token=4.0)["bits_per_byte"]
        1.0
        """
        own = {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}
        return own | ({"bits_per_byte": self.loss / math.log(2) / bytes_per_token} if bytes_per_token else {})


@watched("an evaluation's batch", FIRST_UPDATE_FACTOR)
@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch | None],
    group: ProcessGroup,
    should_stop: Callable[[], bool],
    parts: int = 1,
) -> Evaluation | None:
    """Sum of token losses over number of tokens, over all ranks, divided once at the end.

    `batches` has the same length on every rank (None where this one has nothing to do). Every few batches
    `should_stop`, which must answer alike on all ranks, may end the evaluation: None is returned. `DataError` where
    there is not a single target. Batches are dealt to the ranks in turn, and to the parts: which batches a part has
    does not depend on the number of ranks.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(parts, 2, dtype=torch.float64, device=group.device)  # loss sum, tokens
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
            of_part = totals[(index * group.world_size + group.rank) % parts]
            of_part[0] += token_loss_sum(model, batch).double()
            of_part[1] += tokens
    finally:
        free_gathered_weights(model)
        model.train(was_training)
    totals = group.all_reduce_sum(totals)
    whole = _evaluation(totals.sum(0))
    if not whole.tokens:
        raise DataError("the evaluation set holds nothing to predict: no sequence of it has two tokens")
    return whole if parts == 1 else Evaluation(whole.loss, whole.tokens, tuple(map(_evaluation, totals)))


def own_bytes_per_token(sets: Sequence[EvaluationSet]) -> float | None:
    """Of the run's own validation sets together; None where one does not know it."""
    own = [(each.share, each.bytes_per_token) for each in sets if each.share]
    known = [share * size for share, size in own if size is not None]
    return math.fsum(known) if len(known) == len(own) else None


def mean_of(weighted: Sequence[tuple[float, Evaluation]]) -> Evaluation:
    """The mean loss of several sets, each with its weight, part by part, too; the weights add up to 1.

    >>> mean_of([(0.75, Evaluation(2.0, 10)), (0.25, Evaluation(4.0, 50))])
    Evaluation(loss=2.5, tokens=60, parts=())
    """
    parts = [
        mean_of([(share, part) for (share, _), part in zip(weighted, of_all, strict=True)])
        for of_all in zip(*(each.parts for _, each in weighted), strict=True)
    ]
    loss = math.fsum(share * each.loss for share, each in weighted)
    return Evaluation(loss, sum(each.tokens for _, each in weighted), tuple(parts))


def _evaluation(totals: torch.Tensor) -> Evaluation:
    """Of (loss sum, tokens)."""
    loss_sum, tokens = totals.tolist()
    return Evaluation(loss_sum / tokens if tokens else math.nan, int(tokens))
