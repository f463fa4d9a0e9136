"""The same document gives the same tokens from every path, and none of them is special, whatever the text is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_plain_text import byte_level, sentencepiece_bpe, unigram, wordpiece
from transformers import ByT5Tokenizer

from peft_pretraining.data.documents import SampleMaker
from peft_pretraining.data.json_rows import encodable, json_objects
from peft_pretraining.data.pieces import open_pieces
from peft_pretraining.data.plain_text import PlainText, plain_text_tokenizer, special_ids
from peft_pretraining.data.sources import find_source
from peft_pretraining.data.streaming import Document
from peft_pretraining.data.tally import Tally
from peft_pretraining.data.tokenizer import Encoder

MAKERS = {
    "unigram": unigram,
    "sentencepiece_bpe": sentencepiece_bpe,
    "byte_level": byte_level,
    "wordpiece": wordpiece,
    "python": ByT5Tokenizer,
}
SPELLED = ["</s>", "<s>", "<pad>", "<unk>", "<extra_id_0>", "<|endoftext|>", "<|padding|>", "[CLS]", "[SEP]", "<0x0A>"]
ODD = [
    *('"', "'", '""', "\\", ",", "\t", "\0", "\ufeff", "\ufffe", "\ufdd0 </s> \ufdd1", "\ud800", "\udfff\ud800"),
    *("\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\xa0", "\u3000", "▁", "Ġ"),
    *(
        "e\u0301",
        "\u0301" * 40,
        "\u200b",
        "\u200d",
        "\u202e",
        "\U0001f468\u200d\U0001f469",
        "ﬁ",
        "Å",
        "中文",
        "\U000e0001",
    ),
    *("x" * 700, "spells" * 90, "a b " * 150, " " * 300, "12345678" * 60),
]
WORDS = ["and", "spells", "inside", "it", "NA", "007", "1e5", "True", "nan", "null", " ", "  ", ".", "<", ">", "/s"]

texts = st.lists(st.one_of(*map(st.sampled_from, (SPELLED, ODD, WORDS)), st.text(max_size=6)), max_size=12).map("".join)


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    """A tokenizer and a folder that it is saved in."""
    made = MAKERS[request.param]()
    folder = tmp_path_factory.mktemp("tokenizer") / request.param
    made.save_pretrained(folder)
    return made, folder


def is_one_text_document(text: str) -> bool:
    """Whether a plain text file can hold it: blank lines would divide it, and the last line's end is not text."""
    data = text.encode("utf-8", "surrogatepass")
    lines = data.split(b"\n")
    return all(line.strip() for line in lines) and data == data.rstrip(b"\r\n") and text == encodable(text)


def read(path: Path, tally: Tally) -> list[str]:
    (piece,) = open_pieces(find_source(str(path), False, [], []), None, "text")["train"]
    return list(piece(tally))


def pretokenized(path: Path, folder: Path, eos: int, special: tuple[int, ...]) -> list[list[int]]:
    """Tokens of every document of a file, as pre-tokenisation encodes them."""
    tally = Tally()
    encoded = Encoder(str(folder), eos, special)(read(path, tally))
    assert tally.unusable == 0
    found, place = [], 0
    for length in encoded.lengths:
        found.append(encoded.ids[place : place + length].tolist())
        place += length
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(texts, min_size=1, max_size=4))
def test_every_path_gives_the_same_tokens(tokenizer, tmp_path, documents):
    made, folder = tokenizer
    documents = [json.loads(json.dumps(text)) for text in documents]  # which joins halves of surrogate pairs
    eos, special = made.eos_token_id, special_ids(made)
    plain = list(PlainText(made)([encodable(text) for text in documents]))
    expected = [[*ids, eos] for ids in plain]
    assert not any(special & set(ids) for ids in plain)

    for name, as_ascii in (("a.jsonl", True), ("b.jsonl", False)):
        lines = [json.dumps({"text": text}, ensure_ascii=as_ascii) for text in documents]
        data = "\n".join(lines if as_ascii else map(encodable, lines)).encode()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
        assert pretokenized(tmp_path / name, folder, eos, tuple(special)) == expected
        assert [encodable(row["text"]) for _, row in json_objects(tmp_path / name)] == [*map(encodable, documents)]

        rows = [Document(0, number, line) for number, line in enumerate((tmp_path / name).read_bytes().split(b"\n"))]
        for length in (16, 1 + max(map(len, expected))):  # cut, and whole
            ids, lengths, complaints = SampleMaker(made, length).encode(rows)
            streamed = [row[:count].tolist() for row, count in zip(ids, lengths, strict=True)]
            assert streamed == [row[:length] for row in expected]
            assert all(reason == "holds no text" for _, _, reason in complaints)

    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in documents], indent=1))
    assert pretokenized(tmp_path / "a.json", folder, eos, tuple(special)) == expected
    pyarrow.parquet.write_table(pa.table({"text": [*map(encodable, documents)]}), tmp_path / "a.parquet")
    assert pretokenized(tmp_path / "a.parquet", folder, eos, tuple(special)) == expected

    kept = [number for number, text in enumerate(documents) if is_one_text_document(text)]
    if kept:
        separated = b"\n\n".join(documents[number].encode() for number in kept)
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + separated + b"\n")
        assert pretokenized(tmp_path / "a.txt", folder, eos, tuple(special)) == [expected[number] for number in kept]

    # As fine-tuning calls it: the same between the special tokens that the tokenizer itself puts around a text.
    calling = plain_text_tokenizer(made)
    assert [calling(encodable(text), add_special_tokens=False)["input_ids"] for text in documents] == plain
