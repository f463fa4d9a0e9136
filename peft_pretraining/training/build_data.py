"""The data of a run, opened: blocks that were tokenised before, or documents streamed from shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from peft_pretraining import rng
from peft_pretraining.config import Config, evaluation_sets
from peft_pretraining.config.cli import ParsedArgs
from peft_pretraining.data import blocks
from peft_pretraining.data.data import Data, EvaluationSet
from peft_pretraining.data.documents import Complaints, SampleMaker, ValidationSet, largest_id, training_batches
from peft_pretraining.data.folder import bytes_per_token, read_arguments
from peft_pretraining.data.mixed_order import MixedOrder
from peft_pretraining.data.mixture import Source, sources_of
from peft_pretraining.data.shards import Shard
from peft_pretraining.data.streaming import DocumentStream
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.flags import ConfigError
from peft_pretraining.models.document_mask import document_positions
from peft_pretraining.models.loss import Batch
from peft_pretraining.models.model_config import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_TOKENS_SCANNED = 2**30
"""Tokens whose ids are checked when the data folder does not say how large they are."""


def open_data(launch: ParsedArgs, group: ProcessGroup) -> Data:
    """ConfigError for what only reading the data, or the tokenizer, shows."""
    if launch.facts.shards is not None:
        return StreamedData(launch, group)
    model = launch.facts.model
    vocabulary = None if model is None else vocabulary_size(model)
    sources = sources_of(_given(launch.config.data.dataset_path))
    opened = [_open_blocks(launch, source) for source in sources]
    return BlockData(launch.config, sources, opened, group, vocabulary)


class BlockData:
    """Blocks of tokens in random access, of one folder or a mixture: a position is all the state there is."""

    def __init__(
        self,
        config: Config,
        sources: Sequence[Source],
        opened: Sequence[tuple[blocks.TokenBlocks, blocks.TokenBlocks]],
        group: ProcessGroup,
        vocabulary: int | None = None,
    ):
        """`opened`: train and validation blocks of each source; `vocabulary`: size of the model's table of
        embeddings, where it is known."""
        self._config, self._sources, self._group, self._vocabulary = config, sources, group, vocabulary
        self._train = [train for train, _ in opened]
        seed, sizes = config.run.seed, [len(train) for train in self._train]
        mixed = len(sources) > 1
        own = [
            _evaluation_set(config, source.name if mixed else "", source.share, validation, group, vocabulary)
            for source, (_, validation) in zip(sources, opened, strict=True)
        ]
        self.evaluation_sets: Sequence[EvaluationSet] = [*own, *_further_sets(config, group, vocabulary)]
        self._mixed: MixedOrder | None = None
        self.description = f"{sizes[0]} samples"
        if mixed:
            orders = [
                blocks.SampleOrder(size, rng.derive_seed(seed, "source", index=k)) for k, size in enumerate(sizes)
            ]
            self._mixed = MixedOrder(orders, sizes, [source.share for source in sources], seed)
            shown = (
                f"{each.share:.2%} {each.name} ({size} samples)" for each, size in zip(sources, sizes, strict=True)
            )
            self.description = f"a mixture: {', '.join(shown)}"

    def training(self, position: int, state: dict[str, Any]) -> Iterator[Batch]:
        config = self._config
        batches = blocks.training_batches(
            self._train[0] if len(self._train) == 1 else blocks.MixedBlocks(self._train),
            seed=config.run.seed,
            order=self._mixed,
            start=position,
            batch_size=_given(config.batch.batch_size),
            accumulation=_given(config.batch.gradient_accumulation),
            workers=config.data.workers,
            group=self._group,
            vocabulary=self._vocabulary,
        )
        end = _end_of_documents(config, self._train[0])  # of a mixture's folders, one for all
        return (documents_apart(batch, end) for batch in batches)

    def epoch_at(self, position: int) -> int:
        read = [position] if self._mixed is None else self._mixed.read_before(position)
        return min(samples // len(train) for samples, train in zip(read, self._train, strict=True))

    def read_before(self, position: int) -> dict[str, int]:
        if self._mixed is None:
            return {}
        names = [source.name for source in self._sources]
        return dict(zip(names, self._mixed.read_before(position), strict=True))

    def state_at(self, position: int) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class _BlockEvaluation:
    """The evaluation set, iterated from its beginning each time."""

    config: Config
    blocks: blocks.TokenBlocks
    group: ProcessGroup
    vocabulary: int | None
    share: float = 1.0
    """Of `--eval_tokens`."""

    def __iter__(self) -> Iterator[Batch | None]:
        max_samples = max(1, round(self.config.data.eval_tokens * self.share) // _given(self.config.data.max_length))
        batches = blocks.evaluation_batches(
            self.blocks,
            max_samples=max_samples,
            batch_size=_given(self.config.batch.batch_size),
            group=self.group,
            vocabulary=self.vocabulary,
        )
        end = _end_of_documents(self.config, self.blocks)
        return (batch and documents_apart(batch, end) for batch in batches)


def _end_of_documents(config: Config, split: blocks.TokenBlocks) -> int | None:
    """The token that the documents of a folder end with, where they are to be kept apart; checked to be there."""
    return read_arguments(split.folder)["eos_token_id"] if config.data.document_mask else None


def documents_apart(batch: Batch, end: int | None) -> Batch:
    """The batch with its tokens' positions in documents that end with the token `end`; None: as it is."""
    if end is None:
        return batch
    positions = document_positions(batch["input_ids"], end)
    # Memory that a GPU reads by itself, as that of the tokens.
    return {**batch, "position_ids": positions.pin_memory() if batch["input_ids"].is_pinned() else positions}


def _evaluation_set(
    config: Config, name: str, share: float, split: blocks.TokenBlocks, group: ProcessGroup, vocabulary: int | None
) -> EvaluationSet:
    """A folder's validation split: of a source of a mixture, its share of `--eval_tokens`."""
    batches = _BlockEvaluation(config, split, group, vocabulary, share or 1.0)
    return EvaluationSet(name, share, batches, bytes_per_token(read_arguments(split.folder), "validation"))


def _further_sets(config: Config, group: ProcessGroup, vocabulary: int | None) -> list[EvaluationSet]:
    """The sets of `--eval_datasets`. ConfigError where their files are damaged."""
    found = []
    for name, folder in evaluation_sets.pairs(config.data.eval_datasets).items():
        try:
            split = blocks.TokenBlocks(folder, "validation", _given(config.data.max_length))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError([f"--eval_datasets {name}={folder}: {' '.join(str(error).split())}"]) from error
        if not len(split):
            raise ConfigError([f"--eval_datasets {name}={folder}: split validation is empty"])
        found.append(_evaluation_set(config, name, 0.0, split, group, vocabulary))
    return found


def _open_blocks(launch: ParsedArgs, source: Source) -> tuple[blocks.TokenBlocks, blocks.TokenBlocks]:
    config, facts = launch.config, launch.facts
    where = f"--dataset_path {source.folder}"
    try:
        splits = [
            blocks.TokenBlocks(source.folder, name, _given(config.data.max_length)) for name in ("train", "validation")
        ]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError([f"{where}: {' '.join(str(error).split())}"]) from error
    problems = [f"{where}: split {split.split} is empty" for split in splits if not len(split)]
    if not problems and "largest_token_id" not in facts.data and facts.model is not None:
        largest = max(split.largest_token_id(_TOKENS_SCANNED) for split in splits)
        if largest >= (vocabulary := vocabulary_size(facts.model)):
            problems.append(f"{where}: token id {largest} is beyond the model's vocabulary of {vocabulary}")
    if problems:
        raise ConfigError(problems)
    return splits[0], splits[1]


class StreamedData:
    """Documents of shards, tokenised as they are needed."""

    def __init__(self, launch: ParsedArgs, group: ProcessGroup):
        config, shards = launch.config, _given(launch.facts.shards)
        self._config, self._shards, self._group = config, shards, group
        self._stream: DocumentStream | None = None
        self._maker = SampleMaker(_checked_tokenizer(launch), _given(config.data.max_length))
        self.description = f"{len(shards.train)} shards of documents ({_gigabytes(shards.train)}, {shards.origin})"
        validation = ValidationSet(
            shards.validation,
            self._maker,
            tokens=config.data.eval_tokens,
            batch_size=_given(config.batch.batch_size),
            workers=config.data.workers,
            group=group,
        )
        vocabulary = None if launch.facts.model is None else vocabulary_size(launch.facts.model)
        # Documents are cut: how many bytes their tokens stand for is not known.
        own = EvaluationSet("", 1.0, validation, bytes_per_token=None)
        self.evaluation_sets: Sequence[EvaluationSet] = [own, *_further_sets(config, group, vocabulary)]

    def training(self, position: int, state: dict[str, Any]) -> Iterator[Batch]:
        train = self._shards.train
        self._stream = DocumentStream(train, self._config.run.seed, position, state)
        return training_batches(
            self._stream,
            self._maker,
            Complaints(train),
            start=position,
            batch_size=_given(self._config.batch.batch_size),
            workers=self._config.data.workers,
            group=self._group,
        )

    def epoch_at(self, position: int) -> int:
        return _given(self._stream).epoch_at(position)

    def read_before(self, position: int) -> dict[str, int]:
        return {}

    def state_at(self, position: int) -> dict[str, Any]:
        return _given(self._stream).state_at(position)


def _checked_tokenizer(launch: ParsedArgs) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for, whose ids the model knows."""
    name, model = _given(launch.facts.tokenizer), launch.facts.model
    tokenizer = load_tokenizer(name)
    if model is not None and (largest := largest_id(tokenizer)) >= (vocabulary := vocabulary_size(model)):
        raise ConfigError([f"--tokenizer {name}: token id {largest} is beyond the model's vocabulary of {vocabulary}"])
    return tokenizer


def _given(value: T | None) -> T:
    """What may be missing on a command line, and is not once that has been checked."""
    assert value is not None
    return value


def _gigabytes(shards: tuple[Shard, ...]) -> str:
    return f"{sum(shard.size for shard in shards) / 1e9:.3g} GB"
