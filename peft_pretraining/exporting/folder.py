"""Writing an export: a folder that has all it needs, or nothing of one that could not be finished."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.data.prompt_tokenizer import SavedTokenizer
from peft_pretraining.exporting import adapter, card
from peft_pretraining.exporting.trained import Trained, merged
from peft_pretraining.flags import ConfigError
from peft_pretraining.models.token_ids import adopt

log = logging.getLogger("peft_pretraining")

_NOT_EXPORTED = (run_dir.MANIFEST_FILE, run_dir.STATE_FILE, card.FILE)


def export(
    checkpoint: Path, out: Path, dtype: str | None = None, as_adapter: bool = False, licence: str = card.UNKNOWN
) -> None:
    """Write the merged model to the folder `out`, or the adapter over its base, with tokenizer and model card.

    `dtype` is torch's name of one; None is that of training. Raises `ConfigError` for a checkpoint that cannot be used
    and a folder that cannot be written; nothing is left in it then.
    """
    trained = Trained.read(checkpoint)
    wanted = getattr(torch, dtype) if dtype else None
    about = card.About.of(checkpoint, trained.config, trained.plain, licence)
    if as_adapter:
        adapter.factors_of(trained)
        model = adapter.base_model(trained, wanted)
    else:
        model = merged(trained, wanted)
    length = trained.config.data.max_length or model.config.max_position_embeddings
    tokenizer = SavedTokenizer.of(checkpoint, length)
    if tokenizer.tokenizer is not None:
        for line in adopt(model, tokenizer.tokenizer, {}):
            log.warning(line)
    with _written(out):
        if as_adapter:
            _write_model(model, tokenizer, out / adapter.BASE)
            adapter.write_adapter(trained, model, out)
            tokenizer.write(out)
        else:
            _write_model(model, tokenizer, out)
            _copy_others(checkpoint, out)
        (out / card.FILE).write_text(about.text(model, as_adapter), encoding="utf-8")


def _write_model(model: PreTrainedModel, tokenizer: SavedTokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.write(folder)


def _copy_others(checkpoint: Path, out: Path) -> None:
    """Files that somebody put into the checkpoint's folder."""
    for file in checkpoint.iterdir():
        written = out / file.name
        if (
            file.is_file()
            and not file.is_symlink()
            and not written.exists()
            and not file.name.endswith((".safetensors", ".index.json"))  # whose parts may be other ones
            and file.name not in _NOT_EXPORTED
        ):
            written.write_bytes(file.read_bytes())


@contextlib.contextmanager
def _written(out: Path) -> Iterator[None]:
    """An empty folder `out`, which is empty again, or gone, where it could not be filled."""
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for entry in out.iterdir() if out.is_dir() else ():
            run_dir.remove(entry)
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError([f"{out}: cannot be written ({error.strerror or error})"]) from error
        raise
