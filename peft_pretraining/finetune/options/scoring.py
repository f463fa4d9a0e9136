"""Log-likelihoods of options: many sequences in one padded forward pass, and the losses made of them.

Sequences are padded on the left, so that the scored tokens stand at the end of every row and the model computes logits
for the last few positions alone (`logits_to_keep`). A sequence's last token is predicted but never read, so it is not
fed; options of one token after the same prompt (Yes and No) then have the same input, which is a single row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.finetune.options.encoding import EncodedExample, Scored
from peft_pretraining.models.loss import IGNORED

Batch = dict[str, Tensor]
"""`answers` (examples,): index of the right option, first, as Trainer takes the number of examples from there;
`input_ids`, `attention_mask`, `position_ids` (rows, length): different inputs, padded on the left;
`rows` (sequences,): which of them a sequence reads; `targets` (sequences, kept): its scored tokens, on the right, and
`IGNORED`. For training also `labels`, of which Trainer counts what is not ignored, to weigh micro-batches by."""


def collate(sequences: Sequence[Scored], answers: Sequence[int]) -> Batch:
    """The batch of these sequences, in their order."""
    inputs = {sequence.ids[:-1]: None for sequence in sequences}  # a set that keeps the order
    numbers = {ids: number for number, ids in enumerate(inputs)}
    length = max(map(len, inputs))
    kept = max(sequence.count for sequence in sequences)
    input_ids = torch.tensor([[0] * (length - len(ids)) + list(ids) for ids in inputs])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in inputs])
    return {
        "answers": torch.tensor(list(answers)),
        "input_ids": input_ids,  # (rows, length)
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "rows": torch.tensor([numbers[sequence.ids[:-1]] for sequence in sequences]),
        "targets": torch.tensor(
            [[IGNORED] * (kept - one.count) + list(one.ids[len(one.ids) - one.count :]) for one in sequences]
        ),
    }


def collate_options(examples: Sequence[EncodedExample]) -> Batch:
    """Every option of every example, in this order; then the same after the content-free prompts, if there are any."""
    sequences = [option for example in examples for option in example.options]
    sequences += [option for example in examples for option in example.content_free]
    return collate(sequences, [example.label for example in examples])


def collate_classification(examples: Sequence[EncodedExample]) -> Batch:
    """As `collate_options`, for training: Trainer counts examples."""
    batch = collate_options(examples)
    return batch | {"labels": F.pad(batch["answers"][:, None], (1, 0), value=IGNORED)}


def collate_right_options(examples: Sequence[EncodedExample], only_option: bool = True) -> Batch:
    """The right option of each example, for training; without `only_option` the prompt's tokens are scored as well."""
    right = [example.options[example.label] for example in examples]
    if not only_option:
        right = [Scored(sequence.ids, len(sequence.ids) - 1) for sequence in right]
    batch = collate(right, [example.label for example in examples])
    # Trainer may leave out the first column when it counts, as it does for labels that models shift themselves.
    return batch | {"labels": F.pad(batch["targets"], (1, 0), value=IGNORED)}


def token_log_likelihoods(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Log-likelihood of every target, in float32 at least; 0 where it is ignored. (sequences, kept)

    smoothing: the share of the mean over the vocabulary in each of them, as in `torch.nn.functional.cross_entropy`.
    """
    targets = batch["targets"]
    kept = targets.shape[1]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        logits_to_keep=kept,
    ).logits  # (rows, min(kept, length), vocabulary)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    rows, positions = batch["rows"], torch.arange(kept, device=targets.device)
    chosen = logits[rows[:, None], positions, targets.clamp(min=0)]  # (sequences, kept), no copy of the vocabulary
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * logits.mean(-1)[rows]
    return (chosen - logits.logsumexp(-1)[rows]).masked_fill(targets == IGNORED, 0.0)


def mean_log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over each sequence's scored tokens. (sequences,)"""
    return token_log_likelihoods(model, batch).sum(1) / (batch["targets"] != IGNORED).sum(1)


def option_scores(model: nn.Module, batch: Batch, calibrated: bool = False) -> Tensor:
    """Scores of a batch of `collate_options`, of which the largest is the prediction. (examples, options)

    Mean log-likelihoods; `calibrated`: less those of the same tokens after the content-free prompts.
    """
    return calibrated_scores(mean_log_likelihoods(model, batch), len(batch["answers"]), calibrated)


def calibrated_scores(means: Tensor, examples: int, calibrated: bool) -> Tensor:
    """The scores from the means of a batch's sequences, of which the second half is `calibrated`'s."""
    scores = means.view(2 if calibrated else 1, examples, -1)
    return scores[0] - scores[1] if calibrated else scores[0]


def right_option_loss(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of a batch of `collate_right_options`, and over how many tokens.

    smoothing: of the labels, over the vocabulary.
    """
    return -token_log_likelihoods(model, batch, smoothing).sum(), int((batch["targets"] != IGNORED).sum())


def classification_loss(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Sum of the cross-entropies over the options' mean log-likelihoods, and over how many examples.

    smoothing: of the labels, over the options.
    """
    scores = option_scores(model, batch)
    return F.cross_entropy(scores, batch["answers"], reduction="sum", label_smoothing=smoothing), len(scores)
