"""Checks of a configuration against files: the model's JSON, the data, the run's folder. No torch, no writing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.config import Config, DataConfig, method_settings
from peft_pretraining.config.precision_config import WEIGHT_BYTES
from peft_pretraining.data.folder import DEFAULT_TOKENIZER, read_arguments
from peft_pretraining.data.mixture import Source, sources_of
from peft_pretraining.data.shards import Shards, find_hub_shards, find_local_shards
from peft_pretraining.models import model_config


@dataclass
class FileFacts:
    """What the files say that the run needs to know."""

    model: dict[str, Any] | None = None
    """Settings of the model JSON, under transformers' names."""
    data: dict[str, Any] = field(default_factory=dict)
    """`args.json` of the data folder."""
    shards: Shards | None = None
    """What documents are streamed from."""
    tokenizer: str | None = None
    """What streamed documents are tokenised with: a hub name or a folder."""

    @property
    def block_length(self) -> int | None:
        return self.data.get("sequence_length")


def read_model(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """The model's shape, wherever it comes from."""
    model, run = config.model, config.run
    if model.model_config and model.model_name_or_path:
        problems.append("--model_config and --model_name_or_path contradict each other: give one of them")
    elif model.model_config:
        facts.model = model_config.read_model_json(model.model_config, "--model_config", problems, warnings)
    elif not model.model_name_or_path and not run.warmed_up_model:
        problems.append("--model_config is required (or --model_name_or_path)")
    elif model.model_name_or_path and Path(model.model_name_or_path).is_dir():
        path = Path(model.model_name_or_path) / "config.json"
        facts.model = model_config.read_model_json(str(path), "--model_name_or_path", problems, warnings)
    if run.warmed_up_model:
        _check_warm_start(config, facts, problems)
    if model.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        problems.append(
            "--attn_implementation flash_attention_2 needs flash-attn, which is not installed "
            "(pip install flash-attn --no-build-isolation, on a machine with CUDA)"
        )


def _check_warm_start(config: Config, facts: FileFacts, problems: list[str]) -> None:
    """The weights must be those of the very model that was named, if one was: what is recorded is what is trained."""
    folder = config.run.warmed_up_model
    assert folder is not None, "checked where it is given"
    where = f"--warmed_up_model {folder}"
    if not Path(folder).is_dir():
        problems.append(f"{where}: no such folder")
        return
    saved = model_config.read_model_json(str(Path(folder) / "config.json"), "--warmed_up_model", problems)
    if saved is not None and facts.model is not None:
        other = "--model_config" if config.model.model_config else "--model_name_or_path"
        problems += model_config.contradictions(saved, facts.model, where, other)
    facts.model = facts.model or saved


def read_data(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """The data folder's own description, or the shards that documents are streamed from."""
    data = config.data
    if data.dataset_path is None or data.from_json_data:
        _find_shards(data, facts, problems, warnings)
        return
    if data.padding_data:
        warnings.append("--padding_data has no effect: the blocks of --dataset_path are full")
    try:
        sources = sources_of(data.dataset_path)
    except ValueError as error:
        problems.append(f"--dataset_path {data.dataset_path}: {error}")
        return
    before = len(problems)
    for source in sources:
        if not os.path.isdir(source.folder):
            problems.append(f"--dataset_path {source.folder}: no such folder")
        elif problem := _not_pretokenized(Path(source.folder)):
            problems.append(f"--dataset_path {source.folder} was not written by pretokenize.py: {problem}")
    if len(problems) == before:
        described = [read_arguments(source.folder) for source in sources]
        facts.data = described[0] if len(sources) == 1 else _mixed(sources, described, problems)


def _mixed(sources: Sequence[Source], described: Sequence[dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    """One description of the sources of a mixture, whose blocks and tokenizer must be alike. A resumed run knows its
    data by it: shares and counts of each source are in it."""
    for name in ("sequence_length", "tokenizer", "vocab_size", "eos_token_id"):
        for source, each in zip(sources[1:], described[1:], strict=True):
            if each.get(name) != described[0].get(name):
                problems.append(
                    f"--dataset_path: {source.folder} was made with {name} {each.get(name)}, {sources[0].folder} with "
                    f"{described[0].get(name)}: a mixture has one"
                )
    largest = [each["largest_token_id"] for each in described if each.get("largest_token_id") is not None]
    counts = {
        split: {
            str(at): {"share": source.share, **each.get(split, {})}
            for at, (source, each) in enumerate(zip(sources, described, strict=True))
        }
        for split in ("train", "validation")
    }
    return {**described[0], **counts, **({"largest_token_id": max(largest)} if len(largest) == len(described) else {})}


def _find_shards(data: DataConfig, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    if data.padding_data is False:
        problems.append("--padding_data False: streamed documents are always padded, and padding never counts")
    folder, flag = (data.dataset_path, "--dataset_path") if data.dataset_path else (data.base_dir, "--base_dir")
    facts.tokenizer = data.tokenizer or DEFAULT_TOKENIZER
    if folder is None:
        if data.from_json_data:
            problems.append("--from_json_data needs --dataset_path")
        facts.shards = find_hub_shards(problems, data.max_document_mb)
        return
    if data.from_json_data and _not_pretokenized(Path(folder)) is None:
        problems.append(f"--from_json_data: --dataset_path {folder} was written by pretokenize.py, leave the flag out")
        return
    facts.shards = find_local_shards(folder, flag, problems, warnings, data.max_document_mb)
    if data.tokenizer is None and os.path.isfile(Path(folder) / "tokenizer_config.json"):
        facts.tokenizer = folder


def _not_pretokenized(folder: Path) -> str | None:
    try:
        read_arguments(folder)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return None


def check_data(config: Config, facts: FileFacts, problems: list[str]) -> None:
    """Block length and token ids against the model and `--max_length`."""
    max_length, block = config.data.max_length, facts.block_length
    if max_length == 1 or (block is not None and block < 2):
        what = "--max_length 1" if max_length == 1 else f"--dataset_path {config.data.dataset_path}: blocks of {block}"
        problems.append(f"{what}: a sequence needs 2 tokens at least, one to predict the other from")
    if block and max_length and (max_length > block or block % max_length):
        problems.append(
            f"--max_length {max_length}: the data's blocks of {block} tokens cannot be cut into such pieces"
        )
    if facts.model is None:
        return
    limit = model_config.position_limit(facts.model)
    if max_length and max_length > limit:
        problems.append(
            f"--max_length {max_length} is beyond the model's {limit} positions "
            "(max_position_embeddings: they have no weights, so that a new model may have more)"
        )
    largest, vocabulary = facts.data.get("largest_token_id"), model_config.vocabulary_size(facts.model)
    if largest is not None and largest >= vocabulary:
        problems.append(
            f"--dataset_path {config.data.dataset_path}: token id {largest} is beyond the model's vocabulary "
            f"of {vocabulary}"
        )


def check_document_mask(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """Whether it can be known where documents end, and whether what one computes depends on no other."""
    if not config.data.document_mask:
        return
    if facts.shards is not None and not config.data.eval_datasets:
        how = "with streamed documents, each of which has a sequence of its own"
        warnings.append(f"without effect {how}: --document_mask")
    if facts.data and facts.data.get("eos_token_id") is None:
        problems.append(
            f"--document_mask: --dataset_path {config.data.dataset_path} does not say what documents end with "
            "(args.json has no eos_token_id)"
        )
    if facts.model and model_config.rotary(facts.model)["rope_type"] == "longrope":
        problems.append(
            "--document_mask: the rope_type longrope chooses its factors by the longest document of a micro-batch, so "
            "that documents would depend on each other"
        )


def check_memory(config: Config, facts: FileFacts, problems: list[str]) -> None:
    """Whether the model is beyond the machine by its weights alone."""
    if facts.model is None:
        return
    devices = config.batch.world_size if config.distributed.distributed_type == "fsdp" else 1
    if reason := model_config.memory_problem(facts.model, WEIGHT_BYTES[config.precision.precision], devices):
        source = config.model.model_config or config.model.model_name_or_path or config.run.warmed_up_model
        problems.append(f"the model {source} is too large: {reason}")


def identity_of(config: Config, facts: FileFacts) -> dict[str, Any]:
    """What a resumed run must share with the run it continues."""
    model = {k: v for k, v in (facts.model or {}).items() if k in model_config.IDENTITY_KEYS}
    counts = {key: facts.data.get(key) for key in ("tokenizer", "vocab_size", "sequence_length", "train", "validation")}
    return {
        "model": _fingerprint(model) if model else config.model.model_name_or_path,
        **method_settings.identity(config),
        "data": _fingerprint(_streamed(facts) if facts.shards else counts),
        "max_length": config.data.max_length,
        "document_mask": config.data.document_mask,
    }


def _streamed(facts: FileFacts) -> dict[str, Any]:
    """What decides which tokens a stream yields: the shards, and what the tokenizer is, wherever its folder lies."""
    assert facts.tokenizer is not None and facts.shards is not None, "what is streamed has both"
    file = Path(facts.tokenizer) / "tokenizer.json"
    tokenizer = run_dir.file_digest(file)["sha256"] if file.is_file() else facts.tokenizer
    return {"tokenizer": tokenizer, **facts.shards.described()}


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
