"""Text as nothing but text: tokenizers that make no special token of a document that spells one.

`</s>` or `<extra_id_0>` in a document are characters that somebody wrote. Tokenizers find them in two places: as added
tokens, which `encode_special_tokens` of `tokenizers` switches off, and as entries of the vocabulary itself, which
nothing does (T5's Unigram model has all of them as pieces). So the copies that are made here know their special tokens
by names that no text spells. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text, which never come out of a document; the unknown token does, and is not among them."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id, None}


class PlainText:
    """Text to token ids. Text that spells a special token is ordinary text.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer.add_special_tokens(["</s>"])
    1
    >>> tokenizer.encode("a b </s>").ids, list(PlainText(tokenizer, special=[3])(["a b </s>"]))
    ([0, 1, 3], [[0, 1, 2]])
    """

    def __init__(self, tokenizer: Tokenizer | PreTrainedTokenizerBase, special: Iterable[int] | None = None):
        """A tokenizer of `tokenizers`, of which a copy is used, or one of `transformers`.

        `special` are the ids that stand for no text: without it, what the tokenizer itself says.
        """
        from tokenizers import Tokenizer

        rust: Tokenizer | None
        if isinstance(tokenizer, Tokenizer):
            rust = tokenizer
        else:
            rust = getattr(tokenizer, "backend_tokenizer", None)
            special = special_ids(tokenizer) if special is None else special
        self._rust: Tokenizer | None = None
        self._python = tokenizer
        self._special = frozenset(special or ())
        if rust is not None:
            self._rust, names = _without_spellings(rust, self._special)
            self._rust.no_truncation()
            self._rust.no_padding()
            self._special = frozenset(token for token in self._special if rust.id_to_token(token) in names)

    def __call__(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each text, without any that mark its beginning or end."""
        return map(self._text_only, self._encode(texts))

    def _encode(self, texts: list[str]) -> Iterator[list[int]]:
        if self._rust is not None:
            # "fast": without the offsets into the text
            return (one.ids for one in self._rust.encode_batch_fast(texts, add_special_tokens=False))
        options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "verbose": False}
        python: Any = self._python
        return (python(text, **options)["input_ids"] for text in texts)

    def _text_only(self, ids: list[int]) -> list[int]:
        """Without special tokens, in case that a vocabulary finds a way to them all the same."""
        return ids if self._special.isdisjoint(ids) else [token for token in ids if token not in self._special]


def plain_text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` to encode texts with: text that spells a special token is ordinary text.

    Calls take and return what the original's do: pairs, padding, truncation, and the special tokens that the tokenizer
    itself puts around a text, with the ids that they always had. It may be pickled. It must not be saved beside a
    model, and not be asked for the names of its special tokens: save and decode with the original.
    """
    plain = copy.deepcopy(tokenizer)
    plain.split_special_tokens = True
    if (rust := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        special = special_ids(tokenizer)
        plain._tokenizer, names = _without_spellings(rust, special)
        kept = plain._special_tokens_map
        plain._special_tokens_map = {role: _renamed(token, names) for role, token in kept.items()}
        plain._extra_special_tokens = [_renamed(token, names) for token in plain._extra_special_tokens]
    return plain


def _renamed(token: Any, names: dict[str, str]) -> Any:
    return token if token is None else names.get(str(token), token)


def _without_spellings(rust: Tokenizer, special: Iterable[int]) -> tuple[Tokenizer, dict[str, str]]:
    """A copy whose special tokens keep their ids, but no text spells them; and their new names, by the old ones.

    A special token of a single character stays: it may be the only token that can stand for this character.
    """
    from tokenizers import Tokenizer

    state = json.loads(rust.to_str())
    model, ids = state["model"], set(special)
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["id"] in ids
    spelt = {token["content"] for token in state["added_tokens"] if token["special"]}
    spelt |= {name for name in map(rust.id_to_token, ids) if name is not None}
    spelt |= {name for name in (model.get("unk_token"), _unknown_piece(model)) if name is not None}
    # Spaces never reach a vocabulary's lookup (they are split off, or become another character), nor do the
    # non-characters around the name come out of any normalisation.
    names = {name: f"\ufdd0 {name} \ufdd1" for name in spelt if len(name) > 1}
    for token in state["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], special=True, normalized=False, lstrip=False, rstrip=False)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): index for name, index in model["vocab"].items()}
    else:  # Unigram: its ids are places in a list
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _makes_or_uses(merge, names)]
    plain = Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True
    return plain, names


def _unknown_piece(model: dict[str, Any]) -> str | None:
    """The name of a Unigram model's unknown token, which it knows by its place."""
    return None if (place := model.get("unk_id")) is None else model["vocab"][place][0]


def _makes_or_uses(merge: str | list[str], names: dict[str, str]) -> bool:
    """Whether one of BPE's merges has a renamed token as a part or as its result."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first in names or second in names or first + second in names
