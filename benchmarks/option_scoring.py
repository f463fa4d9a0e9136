"""Options per second, scored many in a pass against one forward pass per option with all logits.

    python benchmarks/option_scoring.py --model_config configs/llama_tiny.json --tokenizer t5-base --task WinoGrande \
        --data rows.jsonl --out benchmark.json

Both give the same predictions, which is checked. The median of the repetitions counts; both are timed by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from peft_pretraining.config import ModelConfig  # noqa: E402
from peft_pretraining.data.json_rows import json_objects  # noqa: E402
from peft_pretraining.data.tokenizer import load_tokenizer  # noqa: E402
from peft_pretraining.finetune.options.encoding import EncodedExample, OptionEncoder  # noqa: E402
from peft_pretraining.finetune.options.scoring import collate_options, option_scores  # noqa: E402
from peft_pretraining.finetune.options.tasks import find_task  # noqa: E402
from peft_pretraining.finetune.options.trainer import by_length  # noqa: E402
from peft_pretraining.models.llama import build_model  # noqa: E402


@torch.no_grad()
def batched(model: nn.Module, examples: Sequence[EncodedExample], batch: int, device: torch.device) -> Tensor:
    """(examples, options), as `run_tasks.py` evaluates."""
    scores = []
    for first in range(0, len(examples), batch):
        tensors = collate_options(examples[first : first + batch])
        scores.append(option_scores(model, {name: value.to(device) for name, value in tensors.items()}))
    return torch.cat(scores)


@torch.no_grad()
def one_by_one(model: nn.Module, examples: Sequence[EncodedExample], batch: int, device: torch.device) -> Tensor:
    """The same by the plain way; `batch` is not used."""
    scores = []
    for example in examples:
        for option in example.options:
            ids = torch.tensor([option.ids], device=device)
            logits = model(input_ids=ids).logits[0, :-1].float()  # (length - 1, vocabulary)
            every = F.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])
            scores.append(every[-option.count :].mean())
    return torch.stack(scores).view(len(examples), -1)


def seconds(function: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    scores = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", type=Path, required=True, help="JSON of a LLaMA, with random weights")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name")
    parser.add_argument("--task", required=True, help="option task of the rows")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines in the task's columns")
    parser.add_argument("--rows", type=int, default=200, help="rows to score (default: 200)")
    parser.add_argument("--batch", type=int, default=32, help="examples per pass (default: 32)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = find_task(arguments.task)
    rows = [row for _, row in json_objects(arguments.data)][: arguments.rows]
    encoder = OptionEncoder(load_tokenizer(arguments.tokenizer), 2048)
    examples = by_length(encoder([task.example(row, number) for number, row in enumerate(rows)]))
    shape = json.loads(arguments.model_config.read_text())
    model = build_model(ModelConfig(dtype=arguments.dtype), shape, None, device, seed=0).eval()

    times: dict[str, list[float]] = {"one by one": [], "batched": []}
    for _ in range(arguments.repetitions + 1):  # the first one warms up
        results = {}
        for name, function in (("one by one", one_by_one), ("batched", batched)):
            taken, results[name] = seconds(lambda f=function: f(model, examples, arguments.batch, device), device)
            times[name].append(taken)
    difference = float((results["one by one"] - results["batched"]).abs().max())
    options = results["batched"].numel()
    median = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    ratio = median["one by one"] / median["batched"]
    print("| scoring | options/s |\n| :-- | --: |")
    for name, taken in median.items():
        print(f"| {name} | {options / taken:,.0f} |")
    print(f"{ratio:.2f} times as fast; largest difference of a score {difference:.2g}")
    if arguments.out:
        numbers = {"task": task.name, "device": str(device), "options": options, "batch": arguments.batch}
        numbers |= {"seconds": times, "ratio": ratio, "largest_difference": difference}
        arguments.out.write_text(json.dumps(numbers, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
