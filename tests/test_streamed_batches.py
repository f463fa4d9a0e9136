"""What becomes of streamed lines: tokens, padding, mask, labels and loss; bad lines; the validation set."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import write_model
from streaming_helpers import VOCABULARY, Threads, group, made_up, named, open_shards, write_lines, write_shards
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_pretraining.data import documents
from peft_pretraining.data.documents import Complaints, SampleMaker, ValidationSet, largest_id, training_batches
from peft_pretraining.data.shards import DataError
from peft_pretraining.data.streaming import Document, DocumentStream, in_order_of_files
from peft_pretraining.data.tokenizer import TRAINED_EOS, TRAINED_PAD, train_tokenizer
from peft_pretraining.models.loss import IGNORED, count_targets, token_loss_sum

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(made_up(300), VOCABULARY, 1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return open_shards(write_shards(tmp_path_factory.mktemp("shards") / "c4"))


def lines(*texts):
    return [Document(0, number, json.dumps({"text": text}).encode()) for number, text in enumerate(texts)]


def test_documents_are_padded_or_cut(tokenizer):
    texts = ["small river", "mountain " * 40, ""]
    made = SampleMaker(tokenizer, LENGTH).__getitems__(lines(*texts))
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for row, ids in enumerate(plain):
        expected = [*ids, eos][:LENGTH]
        padding = LENGTH - len(expected)
        assert made["input_ids"][row].tolist() == expected + [pad] * padding
        assert made["attention_mask"][row].tolist() == [1] * len(expected) + [0] * padding
        assert made["labels"][row].tolist() == expected + [IGNORED] * padding
    assert made["input_ids"].dtype == made["labels"].dtype == made["attention_mask"].dtype == torch.int64
    assert eos not in made["input_ids"][1] and made["complaints"] == [[0, 2, "holds no text"]]
    assert count_targets(made) == len(plain[0]) + LENGTH - 1


def test_text_that_spells_a_special_token_is_text(tokenizer):
    made = SampleMaker(tokenizer, LENGTH).__getitems__(lines(f"a{TRAINED_EOS}b{TRAINED_PAD}"))
    ids = made["input_ids"][0][: made["attention_mask"][0].sum()]
    assert (ids == tokenizer.eos_token_id).sum() == 1 and tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids[:-1]) == f"a{TRAINED_EOS}b{TRAINED_PAD}"


def test_ids_that_only_special_tokens_have_never_come_out(tokenizer, tmp_path):
    """As T5's extra ids, beyond the vocabulary of models that are trained with it."""
    tokenizer.save_pretrained(tmp_path)
    extended = AutoTokenizer.from_pretrained(tmp_path)
    extended.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert len(extended) == VOCABULARY + 1 and largest_id(extended) == VOCABULARY - 1
    extended.add_tokens(["mountain"])
    assert largest_id(extended) == VOCABULARY + 1


@pytest.mark.parametrize(
    "text", ["mountain light " * 400, "x" * 3000 + " a b c", "aé\U0001f600 " * 300, " " * 5000 + "word"]
)
def test_of_a_long_text_no_more_is_tokenised_than_needed_and_nothing_changes(tokenizer, text):
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    input_ids, lengths, _ = SampleMaker(tokenizer, LENGTH).encode(lines(text))
    assert input_ids[0][: lengths[0]].tolist() == [*whole, tokenizer.eos_token_id][:LENGTH]
    maker = SampleMaker(tokenizer, LENGTH)
    assert len(maker._text_ids(["mountain light " * 400])[0]) < 200


def test_the_loss_is_that_of_the_documents_without_padding(tokenizer, tmp_path):
    torch.manual_seed(0)
    shape = json.loads(write_model(tmp_path / "m.json", vocab_size=VOCABULARY).read_text())
    model = LlamaForCausalLM(LlamaConfig(**shape)).double()
    texts = ["small river", "the people of", "mountain " * 40, "", "water and energy in a house"]
    batch = SampleMaker(tokenizer, LENGTH).__getitems__(lines(*texts))
    by_hand, targets = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        ids = ids[:, :LENGTH]
        log_probabilities = model(input_ids=ids).logits.log_softmax(-1)[0]
        for position in range(ids.shape[1] - 1):
            by_hand -= log_probabilities[position, ids[0, position + 1]]
            targets += 1
    batch.pop("complaints")
    assert count_targets(batch) == targets
    assert torch.allclose(token_loss_sum(model, batch), by_hand, rtol=1e-12)
    gradient = torch.autograd.grad(token_loss_sum(model, batch), model.model.embed_tokens.weight)[0]
    assert not gradient[tokenizer.pad_token_id].any()  # as input of padded positions
    assert F.cross_entropy(model(batch["input_ids"]).logits.mT, batch["input_ids"]) != by_hand / targets


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_worker_processes_change_nothing(tokenizer, shards, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    maker, stream = SampleMaker(tokenizer, LENGTH), DocumentStream(shards.train, 3, size=16)
    batches = training_batches(
        *(stream, maker, Complaints(shards.train)), start=100, batch_size=4, workers=workers, group=group()
    )  # over the end of the first epoch
    expected = DocumentStream(shards.train, 3, size=16)
    for first in range(100, 132, 4):
        batch, made = next(batches), maker.__getitems__(expected.take(first, 4))
        assert list(batch) == ["input_ids", "attention_mask", "labels"]
        assert all(torch.equal(batch[name], made[name]) for name in batch)


BAD = ["{", "[1]", '"text"', '{"url": "x"}', '{"text": null}', '{"text": 3}', "\udcff"]


def test_single_bad_lines_are_passed_over_named_and_counted(tokenizer, tmp_path, caplog, monkeypatch):
    good = [json.dumps({"text": text}) for text in made_up(20)]
    path = tmp_path / "c4-train.json"
    content = [
        *(line.encode("utf-8", "surrogateescape") for line in (*good[:10], *BAD)),
        *(g.encode() for g in good[10:]),
    ]
    path.write_bytes(b"\n".join(content))
    write_lines(tmp_path / "c4-validation.json", good)
    train = open_shards(tmp_path).train
    monkeypatch.setattr(logging.getLogger("peft_pretraining"), "propagate", True)
    stream, maker, complaints = DocumentStream(train, 0), SampleMaker(tokenizer, LENGTH), Complaints(train)
    batches = training_batches(stream, maker, complaints, start=0, batch_size=27, workers=0, group=group())
    with caplog.at_level(logging.WARNING, "peft_pretraining"):
        batch = next(batches)
    bad = batch["attention_mask"].sum(1) == 1
    assert bad.sum() == len(BAD) and (batch["labels"][bad][:, 1:] == IGNORED).all()
    # Each has its own count. After some other tests pytest hears every message twice: from the logger and the root.
    said = list(dict.fromkeys(record.message for record in caplog.records))
    assert len(said) == 3 and all("c4-train.json: line 1" in line and "passed over" in line for line in said)
    assert "(3 so far)" in said[-1]


def test_too_many_bad_lines_end_the_run(shards):
    complaints = Complaints(shards.train)
    complaints.add([[0, line, "is not valid JSON"] for line in range(100)], 1000)
    complaints.add([], 10_000)
    complaints.add([[0, 5, "is not valid JSON"]] * 10, 1000)  # 110 of 12,000: within 1 %
    with pytest.raises(DataError, match=r"c4-train.00001.*line 8 is not valid JSON, as 131 of 13000 lines read"):
        complaints.add([[1, 7, "is not valid JSON"]] * 30, 1000)


def all_lengths(tokenizer, shards):
    maker = SampleMaker(tokenizer, LENGTH)
    return maker.encode(list(in_order_of_files(shards.validation)))[1]


@pytest.mark.parametrize("agreement", [2048, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("tokens", [10**9, 150, 1])
def test_evaluation_covers_each_document_once_over_all_ranks(
    tokenizer, shards, world_size, tokens, agreement, monkeypatch
):
    monkeypatch.setattr(documents, "_DOCUMENTS_PER_AGREEMENT", agreement)
    lengths = all_lengths(tokenizer, shards)
    needed = min(int((lengths.cumsum(0) < tokens).sum()) + 1, len(lengths))
    expected = SampleMaker(tokenizer, LENGTH).encode(list(in_order_of_files(shards.validation)))[0][:needed]

    def rank(its_group):
        data = ValidationSet(
            *(shards.validation, SampleMaker(tokenizer, LENGTH)),
            **{"tokens": tokens, "batch_size": 2, "workers": 0, "group": its_group},
        )
        return list(data), list(data)

    results = Threads(world_size).run(rank)
    for again in (0, 1):
        ranks = [result[again] for result in results]
        assert len({len(batches) for batches in ranks}) == 1
        read = [batch for batches in zip(*ranks, strict=True) for batch in batches if batch is not None]
        assert torch.equal(torch.cat([batch["input_ids"] for batch in read]), expected.long())
        assert sum(int(batch["attention_mask"].sum()) for batch in read) == lengths[:needed].sum()


def test_the_validation_documents_are_in_the_order_of_the_files(shards):
    assert named(list(in_order_of_files(shards.validation))) == [(0, i) for i in range(9)] + [(1, i) for i in range(14)]


def test_a_validation_set_without_text(tokenizer, tmp_path):
    for split in ("train", "validation"):
        write_lines(tmp_path / f"c4-{split}.json", ['{"text": ""}'] * 3)
    data = ValidationSet(
        *(open_shards(tmp_path).validation, SampleMaker(tokenizer, LENGTH)),
        **{"tokens": 9, "batch_size": 2, "workers": 0, "group": group()},
    )
    with pytest.raises(DataError, match="hold nothing to predict"):
        list(data)
