"""Checks of a configuration against files: the model's JSON, the data, the run's folder. No torch, no writing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_pretraining import model_config, run_dir
from peft_pretraining.config import DEFAULT_TOKENIZER, Config, DataConfig
from peft_pretraining.data.folder import read_arguments
from peft_pretraining.data.shards import Shards, find_hub_shards, find_local_shards
from peft_pretraining.methods import METHODS

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "auto": 2}


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
    folder, where = config.run.warmed_up_model, f"--warmed_up_model {config.run.warmed_up_model}"
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
    folder = Path(data.dataset_path)
    if not os.path.isdir(folder):
        problems.append(f"--dataset_path {folder}: no such folder")
        return
    problem = _not_pretokenized(folder)
    if problem:
        problems.append(f"--dataset_path {folder} was not written by pretokenize.py: {problem}")
        return
    facts.data = read_arguments(folder)


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
    if block and max_length and (max_length > block or block % max_length):
        problems.append(
            f"--max_length {max_length}: the data's blocks of {block} tokens cannot be cut into such pieces"
        )
    if facts.model is None:
        return
    limit = model_config.position_limit(facts.model)
    if max_length and max_length > limit:
        problems.append(f"--max_length {max_length} is beyond the model's {limit} positions")
    largest, vocabulary = facts.data.get("largest_token_id"), model_config.vocabulary_size(facts.model)
    if largest is not None and largest >= vocabulary:
        problems.append(
            f"--dataset_path {config.data.dataset_path}: token id {largest} is beyond the model's vocabulary "
            f"of {vocabulary}"
        )


def check_memory(config: Config, facts: FileFacts, problems: list[str]) -> None:
    """Whether the model is beyond the machine by its weights alone."""
    if facts.model is None:
        return
    devices = config.batch.world_size if config.distributed.distributed_type == "fsdp" else 1
    if reason := model_config.memory_problem(facts.model, _BYTES[config.model.dtype], devices):
        source = config.model.model_config or config.model.model_name_or_path or config.run.warmed_up_model
        problems.append(f"the model {source} is too large: {reason}")


def check_method(config: Config, problems: list[str], warnings: list[str]) -> None:
    """Settings of the method against each other."""
    method = config.method
    options = METHODS[method.method].options if method.method in METHODS else ()
    if method.proj_type.startswith("continuous") and "proj_type" in options and method.update_proj_gap == 0:
        problems.append(
            f"--update_proj_gap 0: must be positive with --proj_type {method.proj_type}, whose basis learns at 1 / gap"
        )
    if method.method in ("golore", "golore_adapter") and method.rand_ratio > 1:
        warnings.append(f"--rand_ratio {method.rand_ratio:g} is above 1: bases will never be random (0.8 is usual)")
    if method.per_layer and "per_layer" in options:
        if config.optimizer.skip_spikes > 0:
            problems.append(
                f"--skip_spikes {config.optimizer.skip_spikes:g} cannot go with per-layer updates, which are done "
                "before the gradient norm is known"
            )
        if method.refresh_accumulation > 1:
            problems.append(
                f"--refresh_accumulation {method.refresh_accumulation} needs full gradients of several batches, which "
                "per-layer updates never hold: leave one of the two out"
            )
        if config.optimizer.clip_grad_norm > 0 and method.clip_norm == "full":
            warnings.append("--clip_norm full: with per-layer updates every layer adds up its full gradient in float32")


def check_resume_from(config: Config, facts: FileFacts, problems: list[str]) -> None:
    folder = config.run.resume_from
    if folder is None:
        return
    if config.run.warmed_up_model:
        problems.append("--resume_from and --warmed_up_model contradict each other: give one of them")
    if not Path(folder).is_dir():
        problems.append(f"--resume_from {folder}: no such folder")
    elif not (Path(folder) / run_dir.STATE_FILE).is_file() or not (Path(folder) / run_dir.TENSORS_DIR).is_dir():
        problems.append(f"--resume_from {folder} is not a checkpoint of a run (for weights alone: --warmed_up_model)")
    elif config.method.method in METHODS:
        _check_same_run(config, facts, Path(folder).parent, f"--resume_from {folder}", problems, [])


_FACTOR_IDENTITY = ("lora_alpha", "train_scaling", "lora_only", "quantize", "use_double_quant")


def identity_of(config: Config, facts: FileFacts) -> dict[str, Any]:
    """What a resumed run must share with the run it continues."""
    reads = METHODS[config.method.method].options
    model = {k: v for k, v in (facts.model or {}).items() if k in model_config.IDENTITY_KEYS}
    counts = {key: facts.data.get(key) for key in ("tokenizer", "vocab_size", "sequence_length", "train", "validation")}
    return {
        "model": _fingerprint(model) if model else config.model.model_name_or_path,
        "method": config.method.method,
        "optimizer": config.optimizer.optimizer,
        "rank": config.method.rank if "rank" in reads else None,
        "proj_type": config.method.proj_type if "proj_type" in reads else None,
        "target_modules": list(config.method.target_modules) if "target_modules" in reads else None,
        **{name: getattr(config.factors, name) for name in _FACTOR_IDENTITY if name in reads},
        "data": _fingerprint(_streamed(facts) if facts.shards else counts),
        "max_length": config.data.max_length,
    }


def _streamed(facts: FileFacts) -> dict[str, Any]:
    """What decides which tokens a stream yields: the shards, and what the tokenizer is, wherever its folder lies."""
    file = Path(facts.tokenizer) / "tokenizer.json"
    tokenizer = run_dir.file_digest(file)["sha256"] if file.is_file() else facts.tokenizer
    return {"tokenizer": tokenizer, **facts.shards.described()}


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check_save_dir(config: Config, facts: FileFacts, problems: list[str], warnings: list[str]) -> None:
    """The run's folder must be new, or hold the same run; and there must be room and permission to write."""
    folder = Path(config.run.save_dir or "checkpoints")
    if config.run.save_dir and folder.exists():
        if not folder.is_dir():
            problems.append(f"--save_dir {folder} is not a folder")
            return
        if any(folder.iterdir()):
            if config.run.autoresume:
                _check_same_run(config, facts, folder, f"--save_dir {folder} holds another run", problems, warnings)
            else:
                problems.append(
                    f"--save_dir {folder} is not empty: pass --autoresume True to continue the run in it, or choose "
                    "another folder"
                )
    elif config.run.autoresume and config.run.save_dir is None:
        problems.append("--autoresume True needs --save_dir")
    _check_writable(folder, config, facts, problems)


def _check_same_run(
    config: Config, facts: FileFacts, folder: Path, what: str, problems: list[str], warnings: list[str]
) -> None:
    """Compare with the settings that the run in `folder` was begun with, if there are any."""
    try:
        begun = run_dir.read_run_config(folder)
        if begun is None:
            return
        begun_identity, begun_settings = begun["identity"], begun["settings"]
    except Exception as error:  # YAML's errors share no base with OSError; whatever it is, the file is unusable
        problems.append(f"{folder / run_dir.CONFIG_FILE} cannot be read ({' '.join(str(error).split())})")
        return
    for name, old, new in run_dir.differences(begun_identity, identity_of(config, facts)):
        shown = {"model": "another model", "data": "other data"}.get(name, f"{name} {old!r} instead of {new!r}")
        problems.append(f"{what}: it was begun with {shown}")
    for name, old, new in run_dir.differences(begun_settings, config.settings()):
        if name in ("autoresume", "allow_restart"):
            continue
        warnings.append(f"resuming with another --{name}: {new!r} instead of {old!r}")


def _check_writable(folder: Path, config: Config, facts: FileFacts, problems: list[str]) -> None:
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        # An unlinked file: tells the truth on read-only mounts and for root, where permission bits do not.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        problems.append(f"--save_dir {folder}: no permission to write in {parent} ({error.strerror})")
        return
    if facts.model is not None:
        # Exported and training weights; the optimizer's state comes on top.
        needed = 2 * model_config.parameter_count(facts.model) * _BYTES[config.model.dtype]
        free = shutil.disk_usage(parent).free
        if free < needed:
            problems.append(
                f"--save_dir {folder}: no space, a checkpoint takes over {needed / 1e9:.1f} GB "
                f"and {free / 1e9:.1f} are free"
            )
