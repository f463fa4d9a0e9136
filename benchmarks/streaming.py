"""Tokens per second that reach the train loop when documents are streamed, beside blocks that were tokenised before.

    python benchmarks/streaming.py [--text FILE.txt ...] [--tokenizer NAME_OR_FOLDER] [--workers 0 1 ...]

There is no model: batches are taken as fast as they come. Then the processor time until the first line of a run that
goes on at the end of a shard of --shard_megabytes (one of C4's has about 800 MB, uncompressed), plain and compressed.
Without --text, text is made up; without --tokenizer, a BPE is trained on it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pretokenize import BPE_ENTRIES, made_up_text  # noqa: E402
from peft_pretraining.data import blocks, documents  # noqa: E402
from peft_pretraining.data.shards import Shard, find_local_shards  # noqa: E402
from peft_pretraining.data.streaming import DocumentStream  # noqa: E402
from peft_pretraining.data.tokenizer import load_tokenizer, train_tokenizer  # noqa: E402
from peft_pretraining.distributed import ProcessGroup  # noqa: E402

ALONE = ProcessGroup(0, 1, 0, 1, torch.device("cpu"))
BATCH_SIZE = 64
DOCUMENT_CHARACTERS = 2100  # at least; C4's mean


def cut(text: str) -> list[str]:
    """Documents of whole paragraphs."""
    texts, present = [], ""
    for paragraph in text.split("\n\n"):
        present += paragraph + "\n"
        if len(present) >= DOCUMENT_CHARACTERS:
            texts.append(present)
            present = ""
    return texts


def write_data(texts: list[str], tokenizer, length: int, folder: Path) -> Path:
    """Shards in `folder`; the folder of blocks made from the same documents is returned."""
    for split in ("train", "validation"):
        with gzip.open(folder / f"c4-{split}.00000-of-00001.json.gz", "wt", compresslevel=6) as file:
            file.writelines(json.dumps({"text": text, "url": "http://x"}) + "\n" for text in texts)
    tokenizer.save_pretrained(folder / "tokenizer")
    command = [sys.executable, str(ROOT / "pretokenize.py"), "--dataset", str(folder / "c4-*.json.gz")]
    command += ["--tokenizer", str(folder / "tokenizer"), "--sequence_length", str(length)]
    done = subprocess.run([*command, "--save_dir", str(folder / "blocks")], check=True, capture_output=True, text=True)
    return Path(done.stdout.splitlines()[-1])


def streamed(folder: Path, tokenizer, length: int, workers: int) -> Iterator[dict]:
    train = find_local_shards(str(folder), "--base_dir", [], []).train
    maker = documents.SampleMaker(tokenizer, length)
    return documents.training_batches(
        *(DocumentStream(train, 0), maker, documents.Complaints(train)),
        **{"start": 0, "batch_size": BATCH_SIZE, "workers": workers, "group": ALONE},
    )


def from_blocks(folder: Path, length: int, workers: int) -> Iterator[dict]:
    return blocks.training_batches(
        blocks.TokenBlocks(folder, "train", length),
        **{"seed": 0, "start": 0, "batch_size": BATCH_SIZE, "accumulation": 1, "workers": workers, "group": ALONE},
    )


def rates(batches: Iterator[dict], seconds: float) -> dict[str, float]:
    """Per second, once the first batches are there: tokens without padding, and sequences; and tokens per second of
    processor time of this process alone, which other load on the machine hardly changes."""
    for _ in range(8):
        next(batches)
    tokens, sequences, began, cpu = 0, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        batch = next(batches)
        tokens += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
        sequences += len(batch["input_ids"])
    elapsed = time.perf_counter() - began
    return {
        **{"tokens": tokens / elapsed, "sequences": sequences / elapsed},
        "per_cpu_second": tokens / (time.process_time() - cpu),
    }


def seconds_to_the_end(folder: Path, extension: str, megabytes: float, texts: list[str]) -> float:
    """Processor time to the first line of a run that goes on at the end of a large shard."""
    path = folder / f"large{extension}"
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    copies = int(megabytes * 1e6 / sum(map(len, lines)))
    with gzip.open(path, "wb", compresslevel=6) if extension.endswith(".gz") else open(path, "wb") as file:
        for _ in range(copies):
            file.writelines(lines)
    shard = Shard(path.name, path.stat().st_size, str(folder))
    began = time.process_time()
    next(shard.lines(copies * sum(map(len, lines)) - len(lines[-1]), copies * len(lines) - 1))
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--text", nargs="+", help="text files, paragraphs separated by blank lines (default: made up)")
    parser.add_argument("--tokenizer", help=f"hub name or folder (default: a BPE of {BPE_ENTRIES})")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="data-loading processes")
    parser.add_argument("--max_length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, in turn, of which the best counts")
    parser.add_argument("--shard_megabytes", type=float, default=800, help="size of the shard that is gone on in")
    parser.add_argument("--json", default="build/benchmarks/streaming.json", help="where the numbers are written")
    arguments = parser.parse_args()
    texts = cut("\n\n".join(Path(name).read_text() for name in arguments.text) if arguments.text else made_up_text(10))
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else train_tokenizer(texts, BPE_ENTRIES, 1)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = write_data(texts, tokenizer, arguments.max_length, folder)
        for workers in arguments.workers:
            for _ in range(arguments.rounds):
                for what, open_batches in (
                    ("streamed", lambda: streamed(folder, tokenizer, arguments.max_length, workers)),  # noqa: B023
                    ("blocks", lambda: from_blocks(packed, arguments.max_length, workers)),  # noqa: B023
                ):
                    measured = rates(open_batches(), arguments.seconds)
                    results.append({"what": what, "workers": workers, **measured})
        resumed = {
            extension: seconds_to_the_end(folder, extension, arguments.shard_megabytes, texts)
            for extension in (".json", ".json.gz")
        }
    print(f"{'':12}{'workers':>8}{'tokens/s':>14}{'sequences/s':>14}{'tokens/own s':>14}")
    for workers in arguments.workers:
        for what in ("streamed", "blocks"):
            rows = [row for row in results if (row["what"], row["workers"]) == (what, workers)]
            best, cpu = max(rows, key=lambda row: row["tokens"]), max(row["per_cpu_second"] for row in rows)
            print(f"{what:12}{workers:8}{best['tokens']:14,.0f}{best['sequences']:14,.0f}{cpu:14,.0f}")
    for extension, seconds in resumed.items():
        print(f"going on at the end of {arguments.shard_megabytes:g} MB of {extension}: {seconds:.3f} s")
    output = Path(arguments.json)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**vars(arguments), "rates": results, "resumed": resumed}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
