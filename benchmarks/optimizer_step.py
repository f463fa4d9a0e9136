"""Times of one optimizer update on the target layers of LLaMA: of every method, or of projections with their refreshes.

    python benchmarks/optimizer_step.py --threads 1                    # every method, over torch's fused AdamW
    python benchmarks/optimizer_step.py --methods foam racs --sets llama_60m
    python benchmarks/optimizer_step.py --device cuda --dtype bfloat16
    python benchmarks/optimizer_step.py --text FILE --tokenizer DIR    # or --data FOLDER, written by pretokenize.py

Two sets of layers: those of llama_60m at rank 128, and those of one block of llama_1b (2048/5461) at rank 512. What is
timed of every method says method_steps.py; with a text it is what projected_steps.py says.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import method_steps
import projected_steps
import real_gradients
import torch

from peft_pretraining.methods import METHODS
from peft_pretraining.training.profiling import peak_memory_bytes


def main() -> None:
    arguments = parse()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    where += ", CPU time" if arguments.cpu_time else ""
    result: dict[str, Any] = {"device": where, "dtype": str(dtype), "torch": str(torch.__version__)}
    print(f"{where}, {dtype}, torch {torch.__version__}", flush=True)
    if arguments.methods is not None or not (arguments.text or arguments.data):
        methods = arguments.methods or list(METHODS)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        result["methods"] = method_steps.report(methods, arguments.sets, arguments.rounds, device, dtype, clock)
    else:
        result["sets"] = projected_steps.report(arguments, device, dtype)
    if device.type == "cpu":
        result["peak_memory_bytes"] = peak_memory_bytes(device)
        print(f"peak memory of the whole process {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="*", choices=list(METHODS), help="methods to time (default: all, where no text is named)"
    )
    parser.add_argument(
        "--sets", nargs="+", choices=list(method_steps.SETS), default=list(method_steps.SETS), help="sets of layers"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which everything but the SVDs takes its turn")
    parser.add_argument("--slow_rounds", type=int, default=1, help="rounds with full SVDs, too")
    parser.add_argument("--full_matrices", action="store_true", help="also time the full SVD with square U and V")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds, for a busy machine; with --threads 1")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    real_gradients.add_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
