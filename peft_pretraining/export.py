"""The merged, plain LLaMA of a checkpoint, in any dtype."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_pretraining import run_dir
from peft_pretraining.checkpoint import quietly
from peft_pretraining.config import Config
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import load_method
from peft_pretraining.safe_loading import load_tensors


def merged_model(checkpoint: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model that `checkpoint` computes, without factors, on the CPU; `dtype` None is the one it was trained in.

    Merged in float32 at least from the frozen weights and factors of the training state, and rounded once: a float32
    export of a bfloat16 run keeps what the checkpoint's own export had to round away. Raises `ConfigError` if the run's
    settings, beside the checkpoint, are missing.
    """
    run_config = run_dir.read_run_config(checkpoint.parent)
    if run_config is None:
        raise ConfigError(
            [f"{checkpoint.parent / run_dir.CONFIG_FILE}: not found; it says how {checkpoint} was trained"]
        )
    known = Config().settings()
    settings = {name: value for name, value in run_config["settings"].items() if name in known}
    config = Config.from_settings({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})

    plain = load_plain(checkpoint)
    wanted = dtype or plain.dtype
    method = load_method(config.method.method)(config)
    model = method.convert(load_plain(checkpoint))
    with quietly():
        load_tensors({"model": model.state_dict()}, checkpoint / run_dir.TENSORS_DIR, distributed=False)
    model.to(torch.promote_types(plain.dtype, torch.promote_types(wanted, torch.float32)))
    plain.to(wanted).load_state_dict(method.merged_state_dict(model))  # rounds
    plain.config.dtype = wanted
    return plain


def load_plain(checkpoint: Path) -> PreTrainedModel:
    """The checkpoint's own export, in the dtype that it was written in."""
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", attn_implementation="sdpa", trust_remote_code=False
    )


def export(checkpoint: Path, out: Path, dtype: str | None) -> None:
    """Write the merged model and the checkpoint's tokenizer to the folder `out`."""
    merged_model(checkpoint, getattr(torch, dtype) if dtype else None).save_pretrained(out)
    for file in checkpoint.iterdir():
        written = out / file.name
        if (
            file.is_file()
            and not file.is_symlink()
            and not written.exists()
            and file.name not in (run_dir.MANIFEST_FILE, run_dir.STATE_FILE)
        ):
            written.write_bytes(file.read_bytes())
