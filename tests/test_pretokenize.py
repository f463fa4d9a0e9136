"""`pretokenize.py` on real files: packing against a reference, every kind of source, what is left on disk.

What it refuses is in test_pretokenize_refusals.py.
"""

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from transformers import AutoTokenizer, ByT5Tokenizer

import pretokenize
from peft_pretraining.data import block_writer, tokenizer
from peft_pretraining.data.block_writer import BlockWriter

WORDS = "the of and to in water energy nation people great law small river mountain light house never again".split()
LENGTH = 16


def made_up(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(5, 40))) + "." for _ in range(count)]


DOCUMENTS = made_up(300)


def write_json_lines(path: Path, texts: list[str], **columns) -> Path:
    path.write_text("".join(json.dumps({"text": text, **columns}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """A tokenizer trained through the function under test; the tests that use it compare with transformers' own."""
    folder = tmp_path_factory.mktemp("tokenizer") / "small_bpe"
    tokenizer.train_tokenizer(DOCUMENTS, 300, 1).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_json_lines(tmp_path / "corpus.jsonl", DOCUMENTS, url="http://x")


@pytest.fixture
def run(bpe, tmp_path, capsys):
    """A function that runs the command and returns the folder it names in its last line."""

    def call(dataset, *extra, tokenizer=bpe, save_dir=tmp_path / "out", num_cpu=1) -> Path:
        argv = ["--dataset", dataset, "--sequence_length", LENGTH, "--save_dir", save_dir, "--num_cpu", num_cpu, *extra]
        assert (
            pretokenize.main([str(part) for part in [*argv, *(["--tokenizer", tokenizer] if tokenizer else [])]]) == 0
        )
        return Path(capsys.readouterr().out.splitlines()[-1])

    return call


def blocks(result: Path, split: str) -> np.ndarray:
    return np.array(datasets.load_from_disk(str(result))[split]["input_ids"])


def counts(result: Path) -> dict:
    return json.loads((result / "args.json").read_text())


def packed(texts: list[str], folder: Path) -> np.ndarray:
    """The reference: plain Python lists and transformers' tokenizer."""
    hf = AutoTokenizer.from_pretrained(folder)
    stream = [token for text in texts for token in [*hf(text, add_special_tokens=False)["input_ids"], hf.eos_token_id]]
    usable = len(stream) // LENGTH * LENGTH
    return np.array(stream[:usable]).reshape(-1, LENGTH)


def held_out(count: int, share: float, seed: int = 42) -> list[bool]:
    """The reference of the choice of validation documents, from its definition."""
    digests = (hashlib.blake2b(f"{seed}/validation documents/0/{i}".encode(), digest_size=8) for i in range(count))
    return [(int.from_bytes(digest.digest(), "little") >> 1) / 2**63 <= share for digest in digests]


def test_packing_equals_the_reference(run, corpus, bpe):
    result = run(corpus, "--validation_fraction", 0.1)
    chosen = held_out(len(DOCUMENTS), 0.1)
    texts = {
        "train": [text for text, held in zip(DOCUMENTS, chosen, strict=True) if not held],
        "validation": [text for text, held in zip(DOCUMENTS, chosen, strict=True) if held],
    }
    described = counts(result)
    for split in texts:
        expected = packed(texts[split], bpe)
        assert np.array_equal(blocks(result, split), expected)
        assert described[split]["documents"] == len(texts[split]) and described[split]["blocks"] == len(expected)
        assert 0 <= described[split]["tokens"] - expected.size < LENGTH
    assert described["largest_token_id"] == max(blocks(result, split).max() for split in texts)
    column = datasets.load_from_disk(str(result))["train"].features["input_ids"]
    assert column == datasets.List(datasets.Value("uint16"), length=LENGTH)
    assert json.loads((result / "args.json").read_text())["token_dtype"] == "uint16"


def test_args_json_and_tokenizer_are_saved(run, corpus, bpe, tmp_path):
    result = run(corpus, "--seed", 7)
    assert result == tmp_path / "out" / f"corpus_small_bpe_{LENGTH}"
    expected = {"dataset": str(corpus), "tokenizer": str(bpe), "sequence_length": LENGTH, "vocab_size": 300, "seed": 7}
    expected |= {"eos_token_id": 0, "text_field": "text", "take": None, "validation_fraction": 0.005, "num_cpu": 1}
    assert expected.items() <= counts(result).items()
    assert set(counts(result)) >= {flag.name for flag in pretokenize.FLAGS}
    assert (
        AutoTokenizer.from_pretrained(result)("the river").input_ids
        == AutoTokenizer.from_pretrained(bpe)("the river").input_ids
    )


def arrow_bytes(result: Path) -> dict[str, bytes]:
    return {str(path.relative_to(result)): path.read_bytes() for path in sorted(result.glob("*/*"))}


def test_result_does_not_depend_on_processes_or_batches(run, corpus, monkeypatch, tmp_path):
    expected = arrow_bytes(run(corpus))
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 700)
    for num_cpu in (1, 2, 3):
        assert arrow_bytes(run(corpus, num_cpu=num_cpu, save_dir=tmp_path / str(num_cpu))) == expected


def test_files_are_bounded(run, corpus, monkeypatch, tmp_path):
    expected = blocks(run(corpus), "train")
    monkeypatch.setattr(block_writer, "TOKENS_PER_RECORD_BATCH", 10 * LENGTH)
    monkeypatch.setattr(block_writer, "TOKENS_PER_FILE", 50 * LENGTH)
    result = run(corpus, save_dir=tmp_path / "small")
    assert len(list((result / "train").glob("*.arrow"))) == -(-len(expected) // 50)
    assert np.array_equal(blocks(result, "train"), expected)


FORMATS = {
    "a.txt": lambda lines: "\n\n \n".join(DOCUMENTS).encode(),
    "a.txt.gz": lambda lines: gzip.compress("\n\n".join(DOCUMENTS).encode()),
    "a.json": lambda lines: lines,
    "array.json": lambda lines: json.dumps([json.loads(line) for line in lines.splitlines()], indent=1).encode(),
    "a.jsonl": lambda lines: lines.replace(b"\n", b"\n\n"),
    "a.json.gz": gzip.compress,
    # Two frames, as parallel compressors write them.
    "a.jsonl.zst": lambda lines: b"".join(map(zstandard.compress, (lines[:999], lines[999:]))),
    "a.parquet": None,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(run, corpus, bpe, tmp_path, name):
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({"n": range(300), "text": DOCUMENTS}), tmp_path / name, row_group_size=70)
    else:
        (tmp_path / name).write_bytes(FORMATS[name](corpus.read_bytes()))
    result = run(tmp_path / name)
    assert result.name == f"{name.split('.')[0]}_small_bpe_{LENGTH}"
    assert np.array_equal(blocks(result, "train"), blocks(run(corpus), "train"))


def test_documents_of_text_files_keep_their_lines(run, bpe, tmp_path):
    texts = ["one\n  two", *made_up(40)]
    (tmp_path / "a.txt").write_text("\n\n" + texts[0] + "\n\n\n" + "\n\t\n".join(texts[1:]))
    chosen = held_out(len(texts), 0.2)
    assert not chosen[0]
    expected = packed([text for text, held in zip(texts, chosen, strict=True) if not held], bpe)
    assert np.array_equal(blocks(run(tmp_path / "a.txt", "--validation_fraction", 0.2), "train"), expected)


def test_wildcard_from_json_reads_any_extension_in_order(run, corpus, tmp_path):
    lines = corpus.read_text().splitlines(keepends=True)
    (tmp_path / "part-1.data").write_text("".join(lines[100:]))
    (tmp_path / "part-0.data").write_text("".join(lines[:100]))
    result = run(tmp_path / "part-*.data", "--from_json")
    assert np.array_equal(blocks(result, "train"), blocks(run(corpus), "train"))


def test_mixed_types_in_other_columns_and_half_surrogates_do_not_matter(run, tmp_path):
    rows = [{"text": text, "score": index if index % 2 else "high"} for index, text in enumerate(DOCUMENTS)]
    rows[5]["text"] = "broken \ud800 text"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert counts(run(tmp_path / "a.jsonl"))["train"]["documents"] > 290


@pytest.mark.parametrize("other_split", ["validation", "test", None])
def test_folders_saved_by_datasets(run, bpe, corpus, tmp_path, other_split):
    data = datasets.Dataset.from_dict({"text": DOCUMENTS, "n": range(300)})
    other = datasets.Dataset.from_dict({"text": made_up(30, seed=1)})
    (datasets.DatasetDict({"train": data, other_split: other}) if other_split else data).save_to_disk(tmp_path / "x")
    result = run(tmp_path / "x")
    if other_split:
        assert np.array_equal(blocks(result, "train"), packed(DOCUMENTS, bpe))
        assert np.array_equal(blocks(result, "validation"), packed(made_up(30, seed=1), bpe))
    else:
        assert np.array_equal(blocks(result, "train"), blocks(run(corpus), "train"))


def test_local_files_named_like_c4(run, bpe, tmp_path):
    for part in range(3):
        write_json_lines(tmp_path / f"c4-train.{part}.json", DOCUMENTS[part * 100 : part * 100 + 100])
    write_json_lines(tmp_path / "c4-validation.0.json", made_up(30, seed=1))
    result = run(tmp_path / "c4-*.json", "--take", 150)
    assert result.name == f"c4_small_bpe_{LENGTH}"
    assert np.array_equal(blocks(result, "train"), packed(DOCUMENTS[:150], bpe))
    assert np.array_equal(blocks(result, "validation"), packed(made_up(30, seed=1), bpe))


def test_hub_datasets_are_streamed_only_as_far_as_needed(run, bpe, monkeypatch, tmp_path):
    read = []

    def rows():
        for text in DOCUMENTS * 100:
            read.append(text)
            yield {"text": text, "url": "u"}

    def load_dataset(name, config, streaming):
        assert (name, config, streaming) == ("allenai/c4", "en", True)
        train, validation = map(datasets.IterableDataset.from_generator, (rows, rows))
        return datasets.IterableDatasetDict({"train": train, "validation": validation.take(20)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = run("c4", "--dataset_config", "en", "--take", 120)
    assert result == tmp_path / "out" / "allenai" / f"c4_en_small_bpe_{LENGTH}"
    assert np.array_equal(blocks(result, "train"), packed(DOCUMENTS[:120], bpe))
    assert counts(result)["validation"]["documents"] == 20
    assert len(read) < 3000  # a few batches of each split, of 30,000 rows


def test_take_comes_before_the_choice_of_validation_documents(run, corpus):
    described = counts(run(corpus, "--take", 100, "--validation_fraction", 0.1))
    assert described["validation"]["documents"] == sum(held_out(100, 0.1))
    assert described["train"]["documents"] + described["validation"]["documents"] == 100


def test_seed_chooses_validation_documents_all_over_the_data(run, corpus, tmp_path):
    results = [
        run(corpus, "--seed", seed, "--validation_fraction", 0.2, save_dir=tmp_path / str(seed)) for seed in (1, 2)
    ]
    assert not np.array_equal(*(blocks(result, "validation")[:5] for result in results))
    positions = np.flatnonzero(held_out(300, 0.2, seed=1))
    assert positions[0] < 30 and positions[-1] >= 270


def test_validation_has_at_least_one_block(run, corpus, bpe):
    described = counts(run(corpus, "--validation_fraction", 1e-9))
    assert described["validation"]["blocks"] >= 1 and described["validation"]["documents"] <= 3
    assert described["train"]["documents"] + described["validation"]["documents"] == 300


def test_existing_results_are_replaced_only_when_asked_and_complete(run, corpus, monkeypatch):
    result = run(corpus)
    before = arrow_bytes(result)
    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(corpus, "--overwrite", "--seed", 5)
    assert arrow_bytes(result) == before
    assert run(corpus, "--overwrite", "--seed", 5) == result
    assert arrow_bytes(result) != before and [path.name for path in result.parent.iterdir()] == [result.name]


def test_nothing_is_left_of_an_interrupted_run_and_stale_remains_go(run, corpus, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "add", lambda *_: (_ for _ in ()).throw(RuntimeError("disk")))
        with pytest.raises(RuntimeError):
            run(corpus, save_dir=tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    stale = tmp_path / "out" / f"corpus_small_bpe_{LENGTH}.tmp"
    stale.mkdir(parents=True)
    (stale / "half").touch()
    assert not (run(corpus) / "half").exists() and not stale.exists()


def test_training_a_tokenizer(run, corpus, tmp_path):
    result = run(corpus, "--train_tokenizer", 290, tokenizer=None)
    assert result.name == f"corpus_bpe290_{LENGTH}" and counts(result)["vocab_size"] == 290
    trained = AutoTokenizer.from_pretrained(result)
    assert (len(trained), trained.eos_token, trained.pad_token) == (290, "<|endoftext|>", "<|padding|>")
    text = "Ünknown ☃ text\n with  spaces and <|endoftext|>"
    assert trained.decode(trained(text)["input_ids"]) == text
    again = run(corpus, "--train_tokenizer", 290, tokenizer=None, num_cpu=2, save_dir=tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (result / "tokenizer.json").read_bytes()


def test_text_that_spells_a_special_token_does_not_end_a_document(run, tmp_path):
    write_json_lines(tmp_path / "train.jsonl", ["a <|endoftext|> b" for _ in range(20)])
    write_json_lines(tmp_path / "validation.jsonl", made_up(20))
    tokens = blocks(run(tmp_path / "*.jsonl"), "train")
    assert 10 < (tokens == 0).sum() <= 20
    assert 1 not in tokens  # <|padding|>


def test_slow_tokenizers(run, corpus, tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    result = run(corpus, "--take", 20, "--validation_fraction", 0.2, tokenizer=tmp_path / "byt5")
    kept = [text for text, held in zip(DOCUMENTS, held_out(20, 0.2), strict=False) if not held]
    assert np.array_equal(blocks(result, "train"), packed(kept, tmp_path / "byt5"))
