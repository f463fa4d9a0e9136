"""Tokens per second of the whole `pretokenize.py` command, beside those of `tokenizers`' own `encode_batch`.

    python benchmarks/pretokenize.py [--text FILE.txt] [--tokenizer NAME_OR_FOLDER] [--num_cpu N]

Both get the same text and the same number of cores, in turn, so that other load on the machine hits both. The command
runs on one copy of the text and on several; the difference between the two is its steady state, with reading, packing
and writing but without starting Python. Without --text, text is made up; without --tokenizer, a BPE is trained on it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BPE_ENTRIES = 8192


def made_up_text(megabytes: float, seed: int = 0) -> str:
    """Documents of 50 to 500 words; the words' lengths and frequencies are roughly those of a language."""
    random = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = np.array(["".join(random.choice(letters, size)) for size in random.integers(2, 11, size=30_000)])
    documents, characters = [], 0
    while characters < megabytes * 1e6:
        ranks = random.zipf(1.2, size=random.integers(50, 500)) % len(words)
        documents.append(" ".join(words[ranks]))
        characters += len(documents[-1])
    return "\n\n".join(documents) + "\n"


def command_seconds(text: Path, tokenizer: list[str], num_cpu: int, folder: Path) -> tuple[float, Path]:
    """Wall-clock time of one run of the command, and its result's folder."""
    command = [sys.executable, str(ROOT / "pretokenize.py"), "--dataset", str(text), "--save_dir", str(folder)]
    command += [*tokenizer, "--num_cpu", str(num_cpu), "--overwrite"]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return time.perf_counter() - start, Path(done.stdout.splitlines()[-1])


def encode_batch_seconds(tokenizer, documents: list[str], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        tokenizer.encode_batch(documents, add_special_tokens=False)
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Tokens per second of both, per round."""
    text = Path(arguments.text).read_text() if arguments.text else made_up_text(10)
    once, several = folder / "once.txt", folder / "several.txt"
    once.write_text(text)
    several.write_text("\n\n".join([text] * arguments.copies))
    tokenizer = ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
    _, result = command_seconds(
        once, tokenizer or ["--train_tokenizer", str(BPE_ENTRIES)], arguments.num_cpu, folder / "first"
    )
    tokenizer = tokenizer or ["--tokenizer", str(result)]

    from tokenizers import Tokenizer

    from peft_pretraining.data.pieces import open_pieces
    from peft_pretraining.data.sources import find_source
    from peft_pretraining.data.tally import Tally

    rust = Tokenizer.from_file(str(result / "tokenizer.json"))
    documents = [
        text
        for piece in open_pieces(find_source(str(once), False, [], []), None, "text")["train"]
        for text in piece(Tally())
    ]
    counts = json.loads((result / "args.json").read_text())
    extra_copies = arguments.copies - 1
    tokens = extra_copies * sum(counts[split]["tokens"] for split in ("train", "validation"))

    rounds = []
    for _ in range(arguments.rounds):
        reference = encode_batch_seconds(rust, documents, extra_copies)
        short, _ = command_seconds(once, tokenizer, arguments.num_cpu, folder / "once")
        long, _ = command_seconds(several, tokenizer, arguments.num_cpu, folder / "several")
        rounds.append({"encode_batch": tokens / reference, "command": tokens / (long - short)})
        print(
            f"  encode_batch {rounds[-1]['encode_batch']:,.0f}, command {rounds[-1]['command']:,.0f}", file=sys.stderr
        )
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--text", help="text file, documents separated by blank lines (default: made up, 10 MB)")
    parser.add_argument(
        "--tokenizer", help=f"hub name or folder (default: a BPE of {BPE_ENTRIES}, trained on the text)"
    )
    parser.add_argument("--num_cpu", type=int, default=len(os.sched_getaffinity(0)), help="default: all usable cores")
    parser.add_argument("--copies", type=int, default=6, help="copies of the text in the longer of the two runs")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the median counts")
    parser.add_argument("--json", default="build/benchmarks/pretokenize.json", help="where the numbers are written")
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.num_cpu)  # before Rust starts its threads
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        rounds = measure(arguments, Path(folder))
    ratio = statistics.median(each["command"] / each["encode_batch"] for each in rounds)
    print(f"{'tokens/s, ' + str(arguments.num_cpu) + ' cores':24}{'median':>12}")
    for name in ("encode_batch", "command"):
        print(f"{name:24}{statistics.median(each[name] for each in rounds):12,.0f}")
    print(f"{'ratio':24}{ratio:12.2f}")
    output = Path(arguments.json)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**vars(arguments), "rounds": rounds, "ratio": ratio}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
