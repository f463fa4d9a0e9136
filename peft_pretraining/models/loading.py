"""Reading a model's saved weights, so that every one of them is used and none is made up.

transformers draws what is missing, drops what it does not know, casts integers and unties tables that differ, and goes
on; here each of that is refused, with the weight's name. Code that a folder brings along is never run.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from peft_pretraining.flags import ConfigError
from peft_pretraining.models import model_config

log = logging.getLogger("peft_pretraining")

_FLOATING = ("F64", "F32", "F16", "BF16")
"""The types of weights in safetensors' headers that can be trained on; what has fewer bits needs scales beside it."""


def load_pretrained(kind: Any, name: str, what: str, *, new_head: bool = False, **settings: Any) -> PreTrainedModel:
    """The model `kind.from_pretrained(name, **settings)`, with exactly the weights that were saved.

    kind: a class of transformers, or one of its `Auto...` classes.
    what: how the user named the model, for messages: a flag and its value.
    new_head: a task's head that the folder lacks may be drawn, and another task's left out; nothing else.

    Raises `ConfigError` where it cannot be loaded, or a weight is missing, unknown, of another shape, not made of
    floating-point numbers or not finite.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    >>> folder = tempfile.mkdtemp()
    >>> LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(folder)
    >>> load_pretrained(LlamaForCausalLM, folder, f"--model_name_or_path {folder}").num_parameters()
    4656
    >>> try:
    ...     load_pretrained(LlamaForCausalLM, folder, "it", config=LlamaConfig(**sizes, num_hidden_layers=2))
    ... except ConfigError as error:
    ...     print(error.problems[0])
    it: it lacks model.layers.1.input_layernorm.weight and 8 other weights, which would be drawn at random
    """
    try:
        with _quiet_transformers():
            if not {"attn_implementation", "config"} & set(settings):  # otherwise the folder has no say in it
                where = {key: settings[key] for key in ("revision", "cache_dir") if key in settings}
                without_code(AutoConfig.from_pretrained(name, trust_remote_code=False, **where))
            model, report = kind.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **settings
            )
    except Exception as error:  # files can be broken in any way, each with an exception of its own
        raise ConfigError([f"{what} cannot be loaded: {_on_one_line(error)}"]) from error
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    if new_head:
        missing, unexpected = _without_heads(model, missing, unexpected)
    problems = [
        f"{what}: the weight {name} has shape {tuple(saved)}, the model's configuration wants {tuple(wanted)}"
        for name, saved, wanted in sorted(report["mismatched_keys"])[:1]
    ]
    missing -= {name for name, *_ in report["mismatched_keys"]}
    if missing:
        problems.append(f"{what}: it lacks {_some(missing)}, which would be drawn at random")
    if unexpected:
        problems.append(f"{what}: it holds {_some(unexpected)}, which the model's configuration has no place for")
    problems = problems or _wrong_values(model, name, what)
    if problems:
        raise ConfigError(problems)
    return model


def without_code(config: PreTrainedConfig) -> PreTrainedConfig:
    """A model's configuration, as it is. Raises `ValueError` where it names code to be fetched: attention or experts'
    kernels of the hub, `OWNER/NAME`, which transformers would run if the package `kernels` is installed."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in filter(None, parts):
        for kind in ("attn", "experts"):
            asked = getattr(part, f"_{kind}_implementation", None)
            if asked is not None and not re.fullmatch(r"[\w|]+", str(asked)):
                raise ValueError(
                    f"its config.json asks for the {kind}_implementation {asked}: code of the hub is not run"
                )
    return config


def check_is_llama(name: str, what: str, revision: str | None = None) -> None:
    """Whether the configuration of a folder or hub name is one that `model_config.checked` takes.

    Another kind of model would be loaded into a LLaMA's layers as far as names agree. Raises `ConfigError`.
    """
    try:
        with _quiet_transformers():
            settings, _ = PreTrainedConfig.get_config_dict(name, revision=revision or "main")
    except Exception as error:
        raise ConfigError([f"{what} cannot be loaded: {_on_one_line(error)}"]) from error
    problems: list[str] = []
    settings = {key: value for key, value in settings.items() if key != "_commit_hash"}
    if model_config.checked(settings, what, problems) is None:
        raise ConfigError(problems)


def _on_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if "weights_only" in text:  # torch goes on to explain how to run the code in the file
        return "its weights are pickled together with other objects, which are not read (docs/security.md)"
    return text if text and not isinstance(error, LookupError) else f"{type(error).__name__}: {text}".strip(": ")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its tables of what is wrong: the one line with the reason would be lost among theirs."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    logger, level = logging.getLogger("transformers"), logging.getLogger("transformers").level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(before)


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return first + (f" and {len(others)} other weights" if others else "")


def _without_heads(model: PreTrainedModel, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """What is missing and unexpected besides heads: a new one has to be new as a whole. Poolers are part of it."""
    base, prefix = model.base_model, f"{model.base_model_prefix}."
    head = {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    lacking = {name for name in missing if not name.startswith(prefix)}
    if lacking == head & set(model.state_dict()):
        missing = {name for name in missing - lacking if ".pooler." not in name}
        if lacking:
            log.info("drawn at random: the head of the task, %s", _some(lacking))
    parts = {model.base_model_prefix, *(name for name, _ in base.named_children())}
    return missing, {name for name in unexpected if name.partition(".")[0] in parts}


def _wrong_values(model: PreTrainedModel, name: str, what: str) -> list[str]:
    parameters = dict(model.named_parameters())
    for weight, kind in _saved_types(Path(name)):
        if kind not in _FLOATING and weight in parameters:
            return [f"{what}: the weight {weight} is saved as {kind}: quantised weights cannot be trained on"]
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head = model.get_output_embeddings()
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        return [
            f"{what}: its output table differs from its embeddings, though its configuration says that they are one "
            "(tie_word_embeddings)"
        ]
    infinite = [weight for weight, values in parameters.items() if not bool(torch.isfinite(values).all())]
    return [f"{what}: {_some(infinite)}: not all numbers are finite"] if infinite else []


def _saved_types(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and type of every weight in a folder's safetensors files, from their headers."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                yield name, weights.get_slice(name).get_dtype()
