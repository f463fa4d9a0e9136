"""Option tasks in transformers' `Trainer`: the losses, and evaluation by the options' scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from peft_pretraining.finetune.options.encoding import EncodedExample
from peft_pretraining.finetune.options.metrics import compute
from peft_pretraining.finetune.options.scoring import (
    Batch,
    calibrated_scores,
    classification_loss,
    collate_classification,
    collate_options,
    collate_right_options,
    mean_log_likelihoods,
    right_option_loss,
)
from peft_pretraining.finetune.options.settings import OptionSettings
from peft_pretraining.finetune.options.tasks import OptionTask
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.finetune.trainer import MethodTrainer


class OptionTrainer(MethodTrainer):
    """A `MethodTrainer` over lists of `EncodedExample`.

    Predictions are scores (examples, options) and losses (examples,), label ids the right options' indices. An
    example's loss is its right option's mean negative log-likelihood per token; with `--train_as_classification` the
    cross-entropy over the options' scores.
    """

    def __init__(
        self,
        finetuning: FineTuning[OptionSettings],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[EncodedExample] | None = None,
        dev: Sequence[EncodedExample] | None = None,
    ):
        settings = finetuning.task
        task = settings.task
        self._classification = settings.train_as_classification
        self._calibrated = settings.sfc or settings.icl_sfc
        right_options = partial(collate_right_options, only_option=settings.only_train_option)
        super().__init__(
            finetuning,
            model,
            train_dataset=train or None,
            eval_dataset=by_length(dev) if dev else None,
            processing_class=tokenizer,
            data_collator=collate_classification if self._classification else right_options,
            compute_metrics=lambda prediction: metrics_of(task, prediction),
        )
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the targets of the whole update

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The sum over this micro-batch, over the number of tokens (or examples) in the whole update."""
        assert not return_outputs  # evaluation does not come here
        loss = classification_loss if self._classification else right_option_loss
        total, count = loss(model, inputs, self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            return total / count
        # Gradients are averaged over the processes, while the number is that of all of them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * processes / num_items_in_batch

    def prediction_step(  # type: ignore[override]  # predictions may be nested
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, tuple[Tensor, Tensor], Tensor]:
        """No mean loss: `Trainer` would count the rows that fill up the last batch of several processes."""
        inputs = self._prepare_inputs(inputs)
        answers = inputs["answers"]
        with torch.no_grad(), self.compute_loss_context_manager():
            means = mean_log_likelihoods(model, inputs)
            scores = calibrated_scores(means, len(answers), self._calibrated)
        if self._classification:
            losses = nn.functional.cross_entropy(scores, answers, reduction="none")
        else:
            losses = -means[: scores.numel()].view_as(scores).gather(1, answers[:, None]).squeeze(1)
        return None, (scores, losses), answers

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._collating(collate_options):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._collating(collate_options):
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _collating(self, collator: Callable[[Sequence[EncodedExample]], Batch]) -> Iterator[None]:
        for_training, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = for_training


def by_length(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Longest first: batches of alike lengths have little padding, and one that needs too much memory comes first."""
    return sorted(examples, key=lambda example: example.length, reverse=True)


def metrics_of(task: OptionTask, prediction: EvalPrediction) -> dict[str, float]:
    scores, losses = cast("tuple[np.ndarray, np.ndarray]", prediction.predictions)
    values = compute(task.metrics, np.argmax(scores, axis=1), np.asarray(prediction.label_ids), len(task.options))
    return {"loss": float(losses.mean()), **values}
