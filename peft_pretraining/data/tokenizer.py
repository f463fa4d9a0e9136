"""Tokenizers: loading or training one, and encoding documents, in their order, on several cores.

Worker processes import this module, so `transformers` (seconds, and hundreds of megabytes each) is imported only where
it is needed: a Rust tokenizer works without it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peft_pretraining.data.json_rows import one_line
from peft_pretraining.data.plain_text import PlainText
from peft_pretraining.flags import ConfigError
from peft_pretraining.runtime.workers import obey_the_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED_EOS, TRAINED_PAD = "<|endoftext|>", "<|padding|>"
SMALLEST_VOCABULARY = 260  # 256 bytes, the two special tokens, and something to learn

SENTENCEPIECE = ("spiece.model", "tokenizer.model")
"""Names of a SentencePiece model: T5's, and the one that converters (llama.cpp's) look for beside a LLaMA."""

_LARGEST_ID = 2**31 - 1
BATCH_CHARACTERS = 2**18  # about 0.1 s of work: far above the cost of handing it over, far below that of a long wait
BATCH_DOCUMENTS = 4096
BATCHES_AHEAD = 4  # per worker, read before they are needed


class Encoded(NamedTuple):
    """A batch of documents as tokens, each ended by one EOS."""

    ids: np.ndarray  # (sum(lengths),) int32
    lengths: np.ndarray  # (documents,) int64: tokens of each document, EOS included
    sizes: np.ndarray  # (documents,) int64: bytes of each document's text in UTF-8


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a hub name; ConfigError when there is none or it has no EOS."""
    import huggingface_hub
    from transformers import AutoTokenizer

    huggingface_hub.logging.set_verbosity_error()  # its warnings for every retry would bury the one line that counts
    try:
        # Never the code of whoever made it, and no question about it either.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("A few words.", add_special_tokens=False)  # some damage shows no sooner
        largest, eos = max(tokenizer.get_vocab().values(), default=-1), tokenizer.eos_token_id
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # unknown name, no network, damaged files: each of its own; Rust's panics of none
        raise ConfigError([f"--tokenizer {name}: {_why_not_loadable(name, error)}"]) from error
    if eos is None:
        raise ConfigError([f"--tokenizer {name}: has no end-of-sequence token to put between documents"])
    if largest > _LARGEST_ID:
        raise ConfigError([f"--tokenizer {name}: has a token of id {largest}; ids are stored in 32 bits"])
    return tokenizer


def _why_not_loadable(name: str, error: BaseException) -> str:
    folder = Path(name)
    if os.path.isdir(folder) and not os.path.isfile(folder / "tokenizer.json"):
        packages = {
            "spiece.model": "sentencepiece",
            "tokenizer.model": "sentencepiece",
            "tekken.json": "mistral_common",
        }
        for file, package in packages.items():
            if not os.path.isfile(folder / file):
                continue
            if importlib.util.find_spec(package) is None:
                return (
                    f"has {file} but no tokenizer.json: reading it needs `pip install {package}` "
                    "(AutoTokenizer.from_pretrained(...).save_pretrained(...) then writes tokenizer.json)"
                )
            return f"its {file} cannot be read"  # what the libraries say then is that a package is missing
    return f"no folder with a tokenizer, and not loadable from the hub ({one_line(error)})"


def keep_sentencepiece(source: str | Path, folder: Path) -> None:
    """Copy the SentencePiece model of the tokenizer `source`, a folder or a hub name, into `folder`, if it has one.

    transformers reads it, writes `tokenizer.json` and leaves it out; converters want it.
    """
    from transformers.utils import cached_file

    for name in SENTENCEPIECE:
        try:
            found = cached_file(
                str(source),
                name,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError):
            continue
        if found is not None and Path(found).is_file():
            shutil.copyfile(found, folder / name)
            return


def train_tokenizer(documents: Iterable[str], entries: int, num_cpu: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of exactly `entries` entries, special tokens included; it encodes any text without loss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_cpu))  # takes effect when Rust first starts its threads
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[TRAINED_EOS, TRAINED_PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if (learned := tokenizer.get_vocab_size()) != entries:
        raise ConfigError([f"--train_tokenizer {entries}: the training text yields only {learned} entries"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TRAINED_EOS, pad_token=TRAINED_PAD)


class Encoder:
    """Documents to tokens, with the tokenizer that was saved in `folder`: a document ends once, where it ends."""

    def __init__(self, folder: str, eos_id: int, special: tuple[int, ...]):
        """`special`: the ids that stand for no text (`special_ids`)."""
        self._eos_id = eos_id
        if (Path(folder) / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            self._ids = PlainText(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")), special)
        else:
            from transformers import AutoTokenizer

            self._ids = PlainText(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), special)

    def __call__(self, texts: list[str]) -> Encoded:
        pieces, lengths = [], []
        for ids in self._ids(texts):
            if self._eos_id in ids:  # such as one that is a single character
                ids = [token for token in ids if token != self._eos_id]
            pieces += ids
            pieces.append(self._eos_id)
            lengths.append(len(ids) + 1)
        sizes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.int64)
        return Encoded(np.array(pieces, dtype=np.int32), np.array(lengths, dtype=np.int64), sizes)


def encode_documents(
    documents: Iterable[str], folder: Path, eos_id: int, special: tuple[int, ...], num_cpu: int
) -> Iterator[Encoded]:
    """Encode `documents` in their order, in batches, with `num_cpu` processes (1: this one).

    Processes rather than the tokenizer's own threads: those wait for the longest document of each batch, and stand
    still while one thread turns their result into numbers.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers inherit it: one thread each
    if num_cpu == 1:
        yield from map(Encoder(str(folder), eos_id, special), _batches(documents))
        return
    encode = partial(_encode_in_worker, str(folder), eos_id, special)
    # Not forked: this process may have threads (Arrow, Rust, torch) whose locks a fork would copy as they stand.
    pool = ProcessPoolExecutor(num_cpu, get_context("spawn"), initializer=obey_the_parent)
    try:
        pending: deque[Future[Encoded]] = deque()
        for batch in _batches(documents):
            pending.append(pool.submit(encode, batch))
            if len(pending) == BATCHES_AHEAD * num_cpu:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder = cache(Encoder)  # read once per worker, which lives for one `encode_documents`


def _encode_in_worker(folder: str, eos_id: int, special: tuple[int, ...], texts: list[str]) -> Encoded:
    return _worker_encoder(folder, eos_id, special)(texts)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
