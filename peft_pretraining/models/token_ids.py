"""The ids of special tokens in exported models: the tokenizer's beside them, which the model was trained with.

A model's JSON has ids of its own, and transformers gives it some where it has none; `generate` would end at an ordinary
token and never at the trained end of a document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


def adopt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any]) -> list[str]:
    """Put the tokenizer's ids into the model's configuration and that of its generation.

    An id that only the model has stays for the end and for padding, but not for the beginning: where a tokenizer has no
    such token, none was trained. Of several ends, all stay if the tokenizer's is among them. Where the end is what one
    pads with, generation alone is told: a model never trains the row of its own padding. Returns one line for each id
    in `given`, the model's JSON, that contradicts the tokenizer's, and for one that is beyond the vocabulary.
    """
    lines = []
    for name in NAMES:
        own, found = getattr(model.config, name, None), getattr(tokenizer, name)
        stated = given.get(name)
        if name == "pad_token_id" and found == tokenizer.eos_token_id:
            found = None
        if found is None and name != "bos_token_id":
            found = own
        if isinstance(found, int) and found >= model.config.vocab_size:
            lines.append(
                f"the tokenizer's {name} {found} is beyond the model's vocabulary of {model.config.vocab_size}: "
                "exports have none"
            )
            found = None
        if name == "eos_token_id" and isinstance(own, list) and found in own:
            found = own
        elif None not in (stated, found) and stated not in (-1, found):
            lines.append(
                f"the model's JSON has {name} {stated}, its tokenizer {found} "
                f"({tokenizer.convert_ids_to_tokens(found)}): exports take the tokenizer's"
            )
        setattr(model.config, name, found)
        if model.generation_config is not None:
            setattr(model.generation_config, name, found)
    generation = model.generation_config
    if generation is not None and generation.pad_token_id is None:
        ends = generation.eos_token_id
        generation.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return lines
