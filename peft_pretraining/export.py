"""The merged, plain LLaMA of a checkpoint, in any dtype."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_pretraining.checkpoint import resume, run_dir
from peft_pretraining.checkpoint.contents import describe, quietly, without_unsaved_rests
from peft_pretraining.checkpoint.safe_loading import load_tensors
from peft_pretraining.checkpoint.train_state import read_counters
from peft_pretraining.config import Config, config_flags
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.models.llama import cast_weights, torch_dtype
from peft_pretraining.models.token_ids import adopt, read_tokenizer

log = logging.getLogger("peft_pretraining")


def merged_model(checkpoint: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model that `checkpoint` computes, without factors, on the CPU; `dtype` None is the one it was trained in.

    Merged in float32 at least from the frozen weights and factors of the training state, and rounded once: a float32
    export of a bfloat16 run keeps what the checkpoint's own export had to round away. The checkpoint itself says how it
    was trained; for an older one, which does not, the run's settings beside it do. Raises `ConfigError` if both are
    missing, or cannot be used.
    """
    config = Config.from_settings(_settings_of(checkpoint))

    plain = load_plain(checkpoint)
    wanted = dtype or plain.dtype
    method = load_method(config.method.method)(config)
    model = load_plain(checkpoint)
    precision = config.resolved_precision()
    norms_are_wider = precision.norm_dtype != precision.weight_dtype
    if norms_are_wider:  # than the one dtype that transformers gives all weights
        cast_weights(model, plain.dtype, torch_dtype(precision.norm_dtype))
    model = method.convert(model)
    with quietly():
        try:
            tensors = without_unsaved_rests(model.state_dict(), describe(checkpoint))
            load_tensors({"model": tensors}, checkpoint / run_dir.TENSORS_DIR, distributed=False)
        except (OSError, ValueError) as error:
            raise ConfigError([f"{checkpoint} cannot be loaded: {error}"]) from error
    model.to(torch.promote_types(plain.dtype, torch.promote_types(wanted, torch.float32)))
    plain.to(wanted)  # type: ignore[arg-type]  # transformers' decorator hides that it is a method
    if norms_are_wider and dtype is None:
        cast_weights(plain, wanted, torch_dtype(precision.norm_dtype))
    plain.load_state_dict(method.merged_state_dict(model))  # rounds
    plain.config.dtype = wanted
    return plain


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    """The settings under which a checkpoint was written, each through its flag's own converter."""
    path = checkpoint / run_dir.STATE_FILE
    try:
        record = resume.record_of(read_counters(checkpoint))
        if record is None:
            path = checkpoint.parent / run_dir.CONFIG_FILE
            record = resume.record_in_config(checkpoint.parent)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    if record is None:
        raise ConfigError([f"{path}: not found; it says how {checkpoint} was trained"])
    settings: dict[str, Any] = {}
    for flag in config_flags():
        value = record.settings.get(flag.name)
        if value is None:  # which some settings are
            if flag.name in record.settings:
                settings[flag.name] = None
            continue
        try:
            settings[flag.name] = flag.convert(",".join(map(str, value)) if isinstance(value, list) else str(value))
        except ValueError as error:
            raise ConfigError([f"{path}: {flag.name} {error}, and is {str(value)[:100]!r}"]) from error
    if settings.get("method") not in METHODS:
        raise ConfigError([f"{path}: there is no method {str(settings.get('method'))[:100]!r}"])
    return settings


def load_plain(checkpoint: Path) -> PreTrainedModel:
    """The checkpoint's own export, in the dtype that it was written in. Raises `ConfigError`."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", attn_implementation="sdpa", trust_remote_code=False
        )
    except Exception as error:  # files can be broken in any way, each with an exception of its own
        raise ConfigError([f"{checkpoint} cannot be loaded: {' '.join(str(error).split())[:300]}"]) from error


def export(checkpoint: Path, out: Path, dtype: str | None) -> None:
    """Write the merged model to the folder `out`, with its tokenizer and the ids of that one's special tokens."""
    model = merged_model(checkpoint, getattr(torch, dtype) if dtype else None)
    if (tokenizer := read_tokenizer(checkpoint)) is not None:
        for line in adopt(model, tokenizer, {}):
            log.warning(line)
    model.save_pretrained(out)
    for file in checkpoint.iterdir():
        written = out / file.name
        if (
            file.is_file()
            and not file.is_symlink()
            and not written.exists()
            and file.name not in (run_dir.MANIFEST_FILE, run_dir.STATE_FILE)
        ):
            written.write_bytes(file.read_bytes())
