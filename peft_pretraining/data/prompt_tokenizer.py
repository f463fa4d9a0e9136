"""The tokenizer that is saved beside a model: it turns a prompt into the tokens that training had for such a text.

In training one end token follows each document and nothing comes before it, whatever the tokenizer itself would put
around a text. T5's puts its end token behind everything, so that a prompt would be a document that has ended already,
and `generate` would begin another one.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from peft_pretraining.data.tokenizer import SENTENCEPIECE, keep_sentencepiece

log = logging.getLogger("peft_pretraining")

_CONFIG = "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEPT = ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template")


def for_prompts(tokenizer: PreTrainedTokenizerBase, length: int | None) -> PreTrainedTokenizerBase:
    """Returns a tokenizer with the same ids for the same text that adds nothing to it.

    It has a padding token: the end, where there is none, which is what streamed documents are padded with. `length` is
    its `model_max_length`, in tokens; None keeps the tokenizer's own. One without a Rust tokenizer (ByT5's) is returned
    as it is but for these two, with a warning where it adds to a text.
    """
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is not None:
        tokenizer = _plain(tokenizer, _without_additions(rust))
    elif tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        log.warning(
            "the tokenizer of exports puts special tokens around every text, which is in its code "
            "(%s): encode prompts with add_special_tokens=False",
            type(tokenizer).__name__,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if length is not None:
        tokenizer.model_max_length = length
    return tokenizer


def _plain(tokenizer: PreTrainedTokenizerBase, rust: Any) -> PreTrainedTokenizerBase:
    """Of the class that is what its file says: T5's own makes itself anew with its end token, whatever was saved."""
    tokens = {role: token for role in _ROLES if (token := tokenizer._special_tokens_map.get(role)) is not None}
    named = {str(token) for token in tokens.values()}
    kept = {name: value for name in _KEPT if (value := getattr(tokenizer, name, None)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        extra_special_tokens=[token for token in tokenizer.extra_special_tokens if str(token) not in named],
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        **tokens,
        **kept,
    )


def _without_additions(rust: Any) -> Any:
    """A copy of a tokenizer of `tokenizers` that neither adds to a text nor cuts it."""
    from tokenizers import Tokenizer

    state = json.loads(rust.to_str())
    state["truncation"] = state["padding"] = None
    last = state["post_processor"] or {}
    steps = last.get("processors", [last])
    kept = [step for step in steps if step.get("type") == "ByteLevel"]  # which only moves offsets
    state["post_processor"] = kept[0] if kept else None
    return Tokenizer.from_str(json.dumps(state))


def save_for_prompts(source: str | Path, folder: Path, length: int | None) -> PreTrainedTokenizerBase:
    """Write the tokenizer `source`, a folder or a hub name, into `folder` as `for_prompts` has it, and return it.

    Raises what transformers raises for one that cannot be read.
    """
    tokenizer = for_prompts(AutoTokenizer.from_pretrained(source, trust_remote_code=False), length)
    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        _say_it_to_others(folder / _CONFIG)
    keep_sentencepiece(source, folder)
    present = [folder / name for name in SENTENCEPIECE if (folder / name).is_file()]
    for name in SENTENCEPIECE:
        if present and not (folder / name).is_file():
            shutil.copyfile(present[0], folder / name)
    return tokenizer


def _say_it_to_others(path: Path) -> None:
    """What transformers reads from `tokenizer.json`, or calls by a newer name, other programs want to be told."""
    described = json.loads(path.read_text(encoding="utf-8"))
    # llama.cpp puts a beginning before every text unless this says no.
    described |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    path.write_text(json.dumps(described, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


_FILES = (
    *("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *(*SENTENCEPIECE, "vocab.json", "vocab.txt", "merges.txt"),
)
_VOCABULARIES = ("tokenizer.json", *SENTENCEPIECE, "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class SavedTokenizer:
    """The files of a model's tokenizer, to be written beside it as often as it is saved."""

    files: dict[str, bytes] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    """None where there is none, or it cannot be read."""

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    @classmethod
    def of(cls, source: str | Path, length: int | None) -> SavedTokenizer:
        """That of the tokenizer `source`, a folder or a hub name, as `for_prompts` has it, for texts of `length`.

        What a folder holds that cannot be read is taken as it is, with a warning; what the hub has not, or not now,
        there is none of.
        """
        found = {name: path for name in _FILES if (path := Path(source, name)).is_file()}
        if Path(source).is_dir() and not any(name in found for name in _VOCABULARIES):
            return cls({name: path.read_bytes() for name, path in found.items()})
        with tempfile.TemporaryDirectory() as folder:
            try:
                tokenizer = save_for_prompts(source, Path(folder), length)
            except Exception as error:  # files can be broken in any way, each with an exception of its own
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                if not found:
                    log.warning("checkpoints will hold no tokenizer: %s cannot be loaded (%s)", source, reason)
                else:
                    log.warning(
                        "exports keep the model's own ids of special tokens: its tokenizer cannot be read (%s)", reason
                    )
                return cls({name: path.read_bytes() for name, path in found.items()})
            return cls({path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}, tokenizer)
