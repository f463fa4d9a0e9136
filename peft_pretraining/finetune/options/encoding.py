"""From examples to token ids: where an option's tokens begin, and what has to go when a prompt is too long."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_pretraining.data.plain_text import PlainText
from peft_pretraining.finetune.options.tasks import Example
from peft_pretraining.flags import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("peft_pretraining")

SEPARATOR = "\n\n"
"""Between demonstrations, and before the prompt."""


@dataclass(frozen=True)
class Scored:
    """Tokens of which the last `count` are scored, given those before them."""

    ids: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class EncodedExample:
    options: tuple[Scored, ...]
    label: int
    row: int
    content_free: tuple[Scored, ...] = ()
    """The same scored tokens after the content-free prompts, with `--sfc`."""

    @property
    def length(self) -> int:
        """Tokens of its longest option, prompt included."""
        return max(len(option.ids) for option in self.options)


class OptionEncoder:
    """Encodes examples with a tokenizer, at most `max_length` tokens per option with its prompt.

    An option's tokens are those of prompt and option encoded *together* that follow the tokens which the prompt alone
    has too. So a tokenizer that puts the space into the next word (BPE, SentencePiece) sees natural text, and every
    character of the option is scored, whatever was merged at the boundary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.max_length = max_length
        self._ids = PlainText(tokenizer)
        self._start = _start_ids(tokenizer)
        # What a text without a prompt follows, as the first token cannot be scored: what ends the text before.
        self._nothing = self._start or (tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0,)

    def __call__(
        self,
        examples: Sequence[Example],
        demonstrations: Sequence[Example] = (),
        sfc: bool = False,
        icl_sfc: bool = False,
    ) -> list[EncodedExample]:
        """Encode `examples`, each after the `demonstrations`; `sfc` and `icl_sfc`: with content-free prompts, too.

        Raises `ConfigError` if options do not fit into `max_length`, or have no tokens.
        """
        shown = SEPARATOR.join(example.demonstration for example in demonstrations)
        choices = [choice for example in examples for choice in example.choices]
        prompts = [_joined(shown, choice.prompt) for choice in choices]
        wholes = [prompt + choice.text for prompt, choice in zip(prompts, choices, strict=True)]
        frees = [_joined(shown if icl_sfc else "", choice.content_free) for choice in choices] if sfc or icl_sfc else []
        encoded = iter(zip(self._ids(prompts), self._ids(wholes), strict=True))
        free = iter(self._ids(frees))
        problems: list[str] = []
        done, cut = [], 0
        for example in examples:
            pairs = [_split(*next(encoded)) for _ in example.choices]
            longest = max(len(option) for _, option in pairs)
            room = self.max_length - longest - len(self._start)
            if room < 1 or not min(len(option) for _, option in pairs):
                problems.append(_option_problem(example, longest, self.max_length))
                continue
            cut += any(len(prompt) > room for prompt, _ in pairs)
            content_free = [(next(free), option) for _, option in pairs] if frees else []
            options, calibration = (
                tuple(self._scored(prompt[-room:], option) for prompt, option in parts)
                for parts in (pairs, content_free)
            )
            done.append(EncodedExample(options, example.label, example.row, calibration))
        if problems:
            raise ConfigError(problems[:5] + ([f"... and {len(problems) - 5} more"] if len(problems) > 5 else []))
        if cut:
            log.warning(
                "prompts of %d of %d examples were cut from the left to %d tokens", cut, len(done), self.max_length
            )
        return done

    def _scored(self, prompt: Sequence[int], option: Sequence[int]) -> Scored:
        before = (*self._start, *prompt) or self._nothing
        return Scored((*before, *option), len(option))


def _option_problem(example: Example, longest: int, max_length: int) -> str:
    texts = ", ".join(repr(choice.text) for choice in example.choices)
    if longest:
        what = f"an option of {longest} tokens leaves no room for a prompt in --max_length {max_length}"
    else:
        what = "an option has no tokens"
    return f"row {example.row + 1}: {what} ({texts})"


def _joined(shown: str, prompt: str) -> str:
    return SEPARATOR.join(part for part in (shown, prompt) if part)


def _split(prompt: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """The tokens of `whole` that `prompt` begins with too, and the others."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    shared = next((at for at, (one, other) in pairs if one != other), min(len(prompt), len(whole)))
    return whole[:shared], whole[shared:]


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token that the tokenizer itself puts before every text, if it does."""
    begin = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return (begin,) if begin is not None and first == [begin] else ()
