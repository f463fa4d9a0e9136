"""Rows per second that training reads from blocks of two and of four bytes a token, in the order of an epoch.

    python benchmarks/read_blocks.py --rows 200000 --length 256

Both folders hold the same tokens and are read in turns, by one process, as micro-batches of int64. They lie in the
page cache: what a disk adds is its own bytes per second, of which two-byte blocks need half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_pretraining.data.block_writer import BlockWriter, write_dataset_dict
from peft_pretraining.data.blocks import SampleOrder, TokenBlocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments)
    print("| bytes a token | MB on disk | rows/s, median (least to most) |\n|--:|--:|--:|")
    for row in rows:
        speeds = row["rows_per_second"]
        told = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"
        print(f"| {row['bytes']} | {row['disk'] / 1e6:,.1f} | {told} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict]:
    ids = np.random.default_rng(0).integers(0, 32_000, arguments.rows * arguments.length, dtype=np.int32)
    found = []
    for dtype in ("int32", "uint16"):
        write(folder / dtype, dtype, ids, arguments.length)
        size = sum(path.stat().st_size for path in (folder / dtype / "train").glob("*.arrow"))
        blocks = TokenBlocks(folder / dtype, "train", arguments.length)
        found.append({"bytes": np.dtype(dtype).itemsize, "disk": size, "rows_per_second": [], "blocks": blocks})
    order = SampleOrder(arguments.rows, seed=1)
    for turn in range(arguments.turns + 1):  # the first one fills the page cache
        for each in found:
            began = time.perf_counter()
            for start in range(0, arguments.rows - arguments.batch_size + 1, arguments.batch_size):
                each["blocks"].__getitems__(order.samples(np.arange(start, start + arguments.batch_size)).tolist())
            if turn:
                each["rows_per_second"].append(arguments.rows / (time.perf_counter() - began))
    return [{name: value for name, value in each.items() if name != "blocks"} for each in found]


def write(folder: Path, dtype: str, ids: np.ndarray, length: int) -> None:
    folder.mkdir()
    for split in ("train", "validation"):
        writer = BlockWriter(folder / split, length, dtype)
        writer.add(ids if split == "train" else ids[:length], 1)
        writer.finish()
    write_dataset_dict(folder, ["train", "validation"])
    (folder / "args.json").write_text(json.dumps({"sequence_length": length}))


if __name__ == "__main__":
    main()
