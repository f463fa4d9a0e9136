"""Model and tokenizer for sequence classification: an encoder, or a LLaMA that reads the last real token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_pretraining.data.folder import DEFAULT_TOKENIZER
from peft_pretraining.data.plain_text import plain_text_tokenizer
from peft_pretraining.finetune.glue_settings import GlueSettings
from peft_pretraining.finetune.glue_tasks import GlueTask
from peft_pretraining.finetune.loading import check_finite, loaded
from peft_pretraining.flags import ConfigError
from peft_pretraining.models.loading import load_pretrained, without_code
from peft_pretraining.training.tracking import log

_POSITIONS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Model types that count positions from the padding's id on, and so have fewer of them than their table has rows."""

_LARGEST_LIMIT = 1_000_000
"""A tokenizer that knows of no limit says a number far above."""


def load_model(settings: GlueSettings, task: GlueTask) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, with the task's labels in its configuration; a head that it lacks is drawn from torch's
    random numbers. Raises `ConfigError` where model or tokenizer cannot be loaded."""
    name = settings.model
    where: dict[str, Any] = {"revision": settings.model_revision, "cache_dir": settings.cache_dir}
    config = loaded(
        lambda: without_code(AutoConfig.from_pretrained(name, trust_remote_code=False, **where)),
        f"--model_name_or_path {name}",
    )
    if settings.use_llama and config.model_type != "llama":
        raise ConfigError([f"--use_llama: {name} is of type {config.model_type}"])
    tokenizer = _load_tokenizer(settings, config, where)
    config.num_labels = max(1, len(task.labels))
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    # Before the model is made, whose embedding would otherwise never train a wrong row. Models of one direction look
    # for the last token that is not this one.
    config.pad_token_id = tokenizer.pad_token_id
    flag = f"--model_name_or_path {name}"
    options = {"config": config, "dtype": torch.float32, **where}
    model = load_pretrained(AutoModelForSequenceClassification, name, flag, new_head=True, **options)
    check_finite(model, flag)
    return model, tokenizer


def _load_tokenizer(settings: GlueSettings, config: PretrainedConfig, where: dict[str, Any]) -> PreTrainedTokenizerBase:
    name = settings.tokenizer_name or settings.model
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*token*")) and not settings.tokenizer_name:
        log.warning("%s has no tokenizer: %s is used (--tokenizer_name)", name, DEFAULT_TOKENIZER)
        name = DEFAULT_TOKENIZER
    if name != settings.model:
        where = {"cache_dir": where["cache_dir"]}
    tokenizer = loaded(
        lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where), f"the tokenizer {name}"
    )
    if tokenizer.pad_token_id is None:
        # Llama's own has none. Its unknown token, unlike the end of the sequence, hardly ever ends a text.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        log.info("the tokenizer has no padding token: %s is used", tokenizer.pad_token)
    if tokenizer.pad_token_id is None:
        raise ConfigError([f"the tokenizer {name} has no token for padding"])
    return tokenizer


def usable_length(settings: GlueSettings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """`--max_length`, or fewer tokens if the model has no positions for so many."""
    limit = getattr(config, "max_position_embeddings", None) or _LARGEST_LIMIT
    if config.model_type in _POSITIONS_FROM_PADDING:
        limit -= config.pad_token_id + 1
    if config.model_type != "llama" and tokenizer.model_max_length < _LARGEST_LIMIT:
        limit = min(limit, tokenizer.model_max_length)  # a LLaMA may have another model's tokenizer
    if settings.max_length > limit:
        log.warning("--max_length %d: the model takes %d tokens", settings.max_length, limit)
    return min(settings.max_length, limit)


def encoder(
    tokenizer: PreTrainedTokenizerBase, task: GlueTask, length: int, pad: bool, vocabulary: int
) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """A function for `Dataset.map(batched=True)`: texts to token ids, at most `length` of them.

    A text that spells a special token is ordinary text, as in pre-training. Raises `ConfigError` at a token that the
    model's table (`vocabulary` rows) does not have.
    """
    plain = plain_text_tokenizer(tokenizer)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[name] for name in task.columns]
        encoded = plain(*texts, truncation=True, max_length=length, padding="max_length" if pad else False)
        largest = max((max(ids, default=0) for ids in encoded["input_ids"]), default=0)
        if largest >= vocabulary:
            raise ConfigError(
                [
                    f"the tokenizer gives the token {largest}, but the model's table has {vocabulary} rows: it is "
                    "another model's (--tokenizer_name)"
                ]
            )
        return {**encoded, "labels": rows["label"]}

    return encode
