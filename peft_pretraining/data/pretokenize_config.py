"""The flags of `pretokenize.py`, and where its results go. Imported before they are checked: nothing heavy here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining import flags
from peft_pretraining.data.folder import DEFAULT_TOKENIZER
from peft_pretraining.data.lines import LONGEST_DOCUMENT
from peft_pretraining.data.sources import Source
from peft_pretraining.flags import (
    boolean,
    integer,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    setting,
    string,
)

FOREIGN = {
    "dataset": ("dataset_name", "dataset_path", "train_file"),
    "dataset_config": ("dataset_config_name",),
    "text_field": ("text_column", "text_column_name", "text_key"),
    "take": ("max_train_samples",),
    "tokenizer": ("tokenizer_name", "tokenizer_name_or_path"),
    "sequence_length": ("max_length", "max_seq_length", "seq_length", "block_size"),
    "num_cpu": ("num_proc", "num_workers", "workers", "preprocessing_num_workers"),
    "save_dir": ("output_dir",),
    "overwrite": ("overwrite_output_dir",),
}
"""Our flag -> other programs' names of the same setting."""

MOST_PROCESSES = 64  # one process reads and writes for all of them; with many more it would hold them up


def _open_fraction(text: str) -> float:
    if not 0 < (value := number(text)) < 1:
        raise ValueError("must lie between 0 and 1")
    return value


@dataclass(frozen=True)
class PretokenizeConfig:
    """Every flag of `pretokenize.py`."""

    dataset: str | None = setting(
        None, string, "hub name (c4 is allenai/c4), folder saved by `datasets`, or path or wildcard of local files"
    )
    dataset_config: str | None = setting(None, string, "configuration of the hub dataset, such as en")
    text_field: str = setting("text", string, "column that holds the text (default: text)")
    from_json: bool = setting(False, boolean, "read local files as JSON, whatever their extension")
    take: int | None = setting(None, positive_int, "use only so many documents of the train split (default: all)")
    tokenizer: str | None = setting(None, string, f"hub name or folder of a tokenizer (default: {DEFAULT_TOKENIZER})")
    train_tokenizer: int | None = setting(
        None, positive_int, "train a byte-level BPE of so many entries on the train text, instead of --tokenizer"
    )
    max_document_mb: float = setting(
        LONGEST_DOCUMENT,
        positive_float,
        "largest document in MB, unpacked; longer ones are passed over. Tokenising takes 35 to 130 times as much "
        "memory (default: 32)",
    )
    sequence_length: int = setting(512, flags.sequence_length, "tokens per block (default: 512)")
    validation_fraction: float = setting(
        0.005,
        _open_fraction,
        "share of documents held out where the source has no validation split; at least a block (default: 0.005)",
    )
    seed: int = setting(42, integer, "seed of the choice of validation documents (default: 42)")
    num_cpu: int | None = setting(
        None, positive_int, f"tokenising processes (default: the usable cores, at most {MOST_PROCESSES})"
    )
    save_dir: str | None = setting(None, string, "folder in which the result's folder is made")
    overwrite: bool = setting(False, boolean, "replace an existing result, once the new one is complete")
    num_shards: int | None = setting(
        None, positive_int, "slices in which the data is tokenised, each by a command of its own with --shard"
    )
    shard: int | None = setting(
        None, non_negative_int, "0-based slice that this command makes (default: SLURM_ARRAY_TASK_ID, where it is set)"
    )
    merge: bool = setting(False, boolean, "join the --num_shards finished slices, without copying their data")

    @property
    def tokenizer_name(self) -> str:
        return f"bpe{self.train_tokenizer}" if self.train_tokenizer else self.tokenizer or DEFAULT_TOKENIZER

    @property
    def processes(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.num_cpu or min(cores, MOST_PROCESSES)


def result_path(config: PretokenizeConfig, source: Source) -> Path:
    """`SAVE_DIR/{dataset}_{config}_{tokenizer}_{length}`."""
    tokenizer = config.tokenizer_name
    tokenizer = Path(tokenizer).resolve().name if Path(tokenizer).is_dir() else tokenizer.replace("/", "_")
    parts = (source.name, config.dataset_config, tokenizer, str(config.sequence_length))
    assert config.save_dir is not None, "the command line requires it"
    return Path(config.save_dir, "_".join(part for part in parts if part))


def slice_path(config: PretokenizeConfig, source: Source, shard: int) -> Path:
    """`NAME.slices/00003-of-00256` beside the result NAME."""
    result = result_path(config, source)
    return result.with_name(result.name + ".slices") / f"{shard:05d}-of-{config.num_shards:05d}"
