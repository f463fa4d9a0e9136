"""How the model continues prompts while it trains: something to look at beside the loss.

Greedy, so that two samples differ by the model alone and nothing of the run's random state is used. Every token is a
whole forward pass over a batch of the training's shape: compiled layers see no new one, and a sharded model, whose
weights all ranks gather together, is asked equally often on each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_pretraining.config import Config
from peft_pretraining.config.tracking_config import read_prompts
from peft_pretraining.config.validate import FileFacts
from peft_pretraining.data.folder import DEFAULT_TOKENIZER
from peft_pretraining.data.mixture import first_folder
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.distributed import ProcessGroup, free_gathered_weights
from peft_pretraining.flags import ConfigError
from peft_pretraining.models.loss import IGNORED, token_loss_sum
from peft_pretraining.runtime.watchdog import FIRST_UPDATE_FACTOR, goes_on, watched

NEW_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    prompt: str
    continuation: str
    loss: float
    """Mean cross-entropy of the prompt's own tokens after the first, in nats; NaN of one token."""


def mean_loss(samples: Sequence[Sample]) -> float:
    """The mean over prompts that have a loss; NaN without any."""
    losses = [sample.loss for sample in samples if not math.isnan(sample.loss)]
    return math.fsum(losses) / len(losses) if losses else math.nan


class Sampler:
    """The prompts of a run, as tokens on all ranks, and its tokenizer, on the main process."""

    def __init__(self, config: Config, facts: FileFacts, vocabulary: int, group: ProcessGroup):
        """Raises `ConfigError` on all ranks, where there is no tokenizer or it does not fit `vocabulary` ids."""
        self.every = config.tracking.sample_every
        self._group, self._sharded = group, config.distributed.distributed_type == "fsdp" and group.is_collective
        assert config.batch.batch_size is not None and config.data.max_length is not None, "derived"
        self._shape = config.batch.batch_size, config.data.max_length
        self._tokenizer: Any = None
        self._prompts: list[str] = []
        found: list[list[int]] | ConfigError = []
        if self.every and group.is_main:
            found = self._read(config, facts, vocabulary)
        found = group.from_main(found) if self.every else found
        if isinstance(found, ConfigError):
            raise found
        self._ids = found
        """Of each prompt, its last ones if it is longer than a sequence leaves room for."""

    def _read(self, config: Config, facts: FileFacts, vocabulary: int) -> list[list[int]] | ConfigError:
        path, folder = config.tracking.sample_prompts, config.data.dataset_path
        assert path is not None, "checked"
        source = facts.tokenizer or config.data.tokenizer or (first_folder(folder) if folder else DEFAULT_TOKENIZER)
        try:
            self._prompts = read_prompts(path)
            self._tokenizer = load_tokenizer(source)
        except ConfigError as error:
            return ConfigError([f"--sample_every {self.every}: {problem}" for problem in error.problems])
        except ValueError as error:
            return ConfigError([f"--sample_prompts {path}: {error}"])
        ids = [self._tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in self._prompts]
        if (largest := max((token for each in ids for token in each), default=0)) >= vocabulary:
            problem = f"the tokenizer {source} makes id {largest}, beyond the model's vocabulary of {vocabulary}"
            return ConfigError([f"--sample_prompts {path}: {problem}"])
        room = max(self._shape[1] - NEW_TOKENS, 1)
        return [each[-room:] or [self._tokenizer.eos_token_id] for each in ids]

    def is_due(self, update_step: int, last_step: int) -> bool:
        return self.every > 0 and update_step > 0 and (update_step % self.every == 0 or update_step == last_step)

    def sample(self, model: nn.Module) -> list[Sample]:
        """Prompts, how the model continues them and what it makes of them; nothing on ranks that are not asked."""
        if not self._group.is_main and not self._sharded:
            return []
        continued = continue_greedily(model, self._ids, self._shape, self._group.device)
        losses = prompt_losses(model, self._ids, self._shape, self._group.device)
        if not self._group.is_main:
            return []
        eos = self._tokenizer.eos_token_id
        ended = [ids[: ids.index(eos)] if eos in ids else ids for ids in continued]
        return list(map(Sample, self._prompts, map(self._tokenizer.decode, ended), losses))


@watched("a sample", FIRST_UPDATE_FACTOR)
@torch.no_grad()
def continue_greedily(
    model: nn.Module, prompts: list[list[int]], shape: tuple[int, int], device: torch.device
) -> list[list[int]]:
    """The most likely next tokens after each prompt, one by one, up to `NEW_TOKENS` and the length of a sequence.

    What stands right of a position does not change it: prompts of several lengths share a batch of `shape`.
    """
    was_training = model.training
    model.eval()
    batch, length = shape
    results: list[list[int]] = []
    try:
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            ids = torch.zeros(batch, length, dtype=torch.int64)
            for row, prompt in enumerate(part):
                ids[row, : len(prompt)] = torch.tensor(prompt)
            ends = [len(prompt) for prompt in part]
            for _ in range(min(NEW_TOKENS, length - max(ends))):
                goes_on()
                kept = torch.tensor(ends, device=device) - 1
                logits = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=kept).logits
                rows = range(len(part))
                following = logits[list(rows), list(rows)].argmax(-1).tolist()
                for row, token in enumerate(following):
                    ids[row, ends[row]] = token
                    ends[row] += 1
            results += [ids[row, len(prompt) : ends[row]].tolist() for row, prompt in enumerate(part)]
    finally:
        free_gathered_weights(model)
        model.train(was_training)
    return results


@watched("a sample", FIRST_UPDATE_FACTOR)
@torch.no_grad()
def prompt_losses(
    model: nn.Module, prompts: list[list[int]], shape: tuple[int, int], device: torch.device
) -> list[float]:
    """Mean loss of each prompt's tokens after the first, in nats, NaN of one token: the rest of a batch is ignored."""
    was_training = model.training
    model.eval()
    losses = []
    try:
        for prompt in prompts:
            goes_on()
            ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
            ids[0, : len(prompt)] = labels[0, : len(prompt)] = torch.tensor(prompt)
            total = token_loss_sum(model, {"input_ids": ids.to(device), "labels": labels.to(device)})
            losses.append(float(total) / (len(prompt) - 1) if len(prompt) > 1 else math.nan)
    finally:
        free_gathered_weights(model)
        model.train(was_training)
    return losses
