"""Evaluations that are told in parts."""

from __future__ import annotations

import math

import helpers
import pytest
import torch

from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.training.evaluate import evaluate


def test_the_batches_of_an_evaluation_are_dealt_to_parts(command, tmp_path):
    """Parts are told beside the whole, and make it up: 20 blocks are 5 batches, 3 and 2 of them."""
    assert helpers.run(command(num_training_steps=2, eval_parts=2)) == 0
    for record in helpers.records(tmp_path / "run"):
        if "loss" not in record:
            even, odd = (math.log(record[f"final_eval_perplexity_{part}"]) for part in range(2))
            assert record["final_eval_loss"] == pytest.approx(0.6 * even + 0.4 * odd) and even != odd


class OneOfSome(ProcessGroup):
    """A process whose sums stay its own."""

    def all_reduce_sum(self, tensor):
        return tensor


class LossOfFirstToken(torch.nn.Module):
    fused_loss = True

    def forward(self, input_ids, token_labels, **_):
        return (token_labels >= 0).sum() * input_ids[0, 0].float()


def test_the_parts_of_an_evaluation_do_not_depend_on_the_number_of_ranks():
    batches = [{"input_ids": torch.full((1, length), length)} for length in (2, 3, 4, 5, 7)]

    def parts_of(rank, ranks):
        group = OneOfSome(rank, ranks, rank, ranks, torch.device("cpu"))
        mine = [batches[i] if i < len(batches) else None for i in range(rank, len(batches) + rank, ranks)]
        return evaluate(LossOfFirstToken(), mine, group, lambda: False, parts=2).parts

    (even, odd), even_on_first, odd_on_second = parts_of(0, 1), parts_of(0, 2)[0], parts_of(1, 2)[1]
    assert (even.tokens, odd.tokens) == (1 + 3 + 6, 2 + 4)
    assert (even.loss, odd.loss) == pytest.approx(((2 * 1 + 4 * 3 + 7 * 6) / 10, (3 * 2 + 5 * 4) / 6))
    assert (even_on_first, odd_on_second) == (even, odd)  # of two ranks each has one of the parts
