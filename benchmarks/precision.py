"""What each precision costs in quality: the same small runs in float32, `mixed`, `bf16` and `bf16_sr`, side by side.

    python benchmarks/precision.py quickstart/wiki_intros.jsonl --out DIR      # 16 runs; may be stopped and repeated
    python benchmarks/precision.py TEXT --out DIR --methods full_rank --seeds 0 --updates 2500
    python benchmarks/precision.py TEXT --out DIR --precisions fp32 bf16/published bf16/weight bf16/float32

A LLaMA of 0.5M weights (or of other `--hidden`, `--layers`) learns the corpus byte by byte; what follows a slash is
`--state_dtype`. Per run: the validation loss after the last update, how many of the norms' weights have moved from the
1.0 at which they began, how large the second moments ended, tokens per second, and bytes of weights and of optimizer
state. On the CPU, where products in bf16 are 30 to 100 times slower than in float32, they are emulated: factors that
are bf16 numbers are multiplied in float32, and the result is rounded to bf16 once, which is what tensor cores do.
Everything else (storage, rounding, states, norms, the loss) is the project's own, unchanged.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

SHAPE = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6},
    **{"num_attention_heads": 4, "vocab_size": 256, "initializer_range": 0.02},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False},
}
METHODS = {
    "full_rank": "--method full_rank --lr 0.002",
    "galore": "--method galore --lr 0.01 --rank 24 --scale 0.25 --update_proj_gap 100",
}
PRECISIONS = ("fp32", "mixed", "bf16", "bf16_sr")
COMMON = "--batch_size 8 --scheduler cosine --min_lr_ratio 0.1 --keep_checkpoints 1 --workers 0 --autoresume True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="JSON lines with a `text` each, or plain text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and results.json")
    parser.add_argument("--updates", type=int, default=2500)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), help="each PRECISION or PRECISION/STATES")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--hidden", type=int, default=96, help="a multiple of 8")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--flags", default="", help="further flags of torchrun_main.py, for every run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": arguments.hidden, "intermediate_size": arguments.hidden * 8 // 3}
    sizes |= {"num_hidden_layers": arguments.layers, "max_position_embeddings": arguments.length}
    (arguments.out / "model.json").write_text(json.dumps({**SHAPE, **sizes}))
    data = write_blocks(arguments.corpus, arguments.out / "data", arguments.length)
    runs = [(m, p, seed) for seed in arguments.seeds for m in arguments.methods for p in arguments.precisions]
    with ThreadPoolExecutor(arguments.processes) as pool:
        results = list(pool.map(lambda run: measured(*run, data, arguments), runs))
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)


def write_blocks(corpus: Path, folder: Path, length: int) -> Path:
    """The corpus as blocks of bytes, every 50th of which is kept for validation."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    if (folder / "args.json").is_file():
        return folder
    text = corpus.read_text()
    if corpus.suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
    found = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    blocks = found[: len(found) // length * length].reshape(-1, length)
    chosen = np.arange(len(blocks)) % 50 == 0
    features = Features({"input_ids": List(Value("int32"), length=length)})
    parts = {"train": blocks[~chosen], "validation": blocks[chosen]}
    made = {name: Dataset.from_dict({"input_ids": list(part)}, features=features) for name, part in parts.items()}
    DatasetDict(made).save_to_disk(str(folder))
    (folder / "tokenizer_config.json").write_text("{}")
    described = {"sequence_length": length, "vocab_size": 256, "largest_token_id": 255}
    (folder / "args.json").write_text(json.dumps(described))
    return folder


def measured(method: str, precision: str, seed: int, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, which goes on where it was, and its numbers."""
    folder = arguments.out / f"{method}-{precision.replace('/', '-')}-{seed}"
    name, _, states = precision.partition("/")
    flags = [
        *("--model_config", str(arguments.out / "model.json"), "--dataset_path", str(data), "--save_dir", str(folder)),
        *("--num_training_steps", str(arguments.updates), "--warmup_steps", str(max(1, arguments.updates // 25))),
        *("--eval_every", str(arguments.updates), "--save_every", str(arguments.updates), "--seed", str(seed)),
        *(
            *COMMON.split(),
            *METHODS[method].split(),
            "--precision",
            name,
            *(("--state_dtype", states) if states else ()),
            *arguments.flags.split(),
        ),
    ]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [sys.executable, __file__, "--one-run", *flags]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return {"method": method, "precision": precision, "seed": seed, **numbers_of(folder)}


def numbers_of(folder: Path) -> dict[str, Any]:
    """What a finished run comes to."""
    from safetensors import safe_open

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row.get("final_eval_loss") is not None]
    rates = [row["throughput_tokens"] for row in rows if row.get("throughput_tokens")]
    newest = max(folder.glob("model_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
    norms = moved = size = 0
    for file in newest.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                size += tensor.numel() * tensor.element_size()
                if "norm" in name:
                    norms, moved = norms + tensor.numel(), moved + int((tensor != 1).sum())
    return {
        "loss": evaluations[-1]["final_eval_loss"],
        "norms_moved": moved / norms,
        "tokens_per_second": statistics.median(rates),
        "root_of_second_moments": root_of_second_moments(newest),
        "weight_bytes": size,
        "state_bytes": evaluations[-1]["optimizer_state_bytes"],
    }


def root_of_second_moments(checkpoint: Path) -> float:
    """The mean of √v over the decoder's matrices: what AdamW divides by. `checkpoint` is a step's folder."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = checkpoint / "training_state"
    described = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    names = [name for name in described if name.endswith(".exp_avg_sq") and "_proj." in name]
    state = {name: torch.empty(described[name].size, dtype=described[name].properties.dtype) for name in names}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return float(torch.cat([value.flatten() for value in state.values()]).double().sqrt().mean())


def print_table(results: list[dict[str, Any]]) -> None:
    """Means over the seeds, and each precision's distance from float32."""
    seeds = sorted({result["seed"] for result in results})
    print("| method | precision | validation loss, by seed | against fp32, by seed | mean | norms moved | mean √v |")
    print("|---|---|---|---|---|---|---|")
    by_run = {(r["method"], r["precision"], r["seed"]): r for r in results}
    for method, precision in dict.fromkeys((r["method"], r["precision"]) for r in results):
        rows = [by_run[method, precision, seed] for seed in seeds]
        exact = [by_run.get((method, "fp32", seed), {}).get("loss", math.nan) for seed in seeds]
        apart = [row["loss"] - other for row, other in zip(rows, exact, strict=True)]
        losses, by_seed = (
            ", ".join(each) for each in ([f"{row['loss']:.4f}" for row in rows], [f"{a:+.4f}" for a in apart])
        )
        moved = statistics.mean(row["norms_moved"] for row in rows)
        root, mean = statistics.mean(row["root_of_second_moments"] for row in rows), statistics.mean(apart)
        print(f"| {method} | {precision} | {losses} | {by_seed} | {mean:+.4f} | {moved:.0%} | {root:.2e} |")
    print()
    print("| method | precision | tokens/s | weights, MB | state, MB |")
    print("|---|---|---|---|---|")
    for method, precision in dict.fromkeys((r["method"], r["precision"]) for r in results):
        row = by_run[method, precision, seeds[0]]
        rate = statistics.median(by_run[method, precision, seed]["tokens_per_second"] for seed in seeds)
        sizes = f"{row['weight_bytes'] / 1e6:.2f} | {row['state_bytes'] / 1e6:.2f}"
        print(f"| {method} | {precision} | {rate:,.0f} | {sizes} |")


def one_run(flags: list[str]) -> int:
    """A run of the project, with products of bf16 numbers emulated where they would be slow."""
    import torch

    from peft_pretraining.config import cli
    from peft_pretraining.training.build import run

    launch = cli.load(flags)
    if torch.cuda.is_available():
        return run(launch)
    with emulated_products():
        return run(launch)


def emulated_products() -> Any:
    """Within it, products of bf16 matrices are made in float32 and rounded once, backward as well as forward."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    products = {F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
    attention = {F.scaled_dot_product_attention}

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    class Emulated(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            first = args[0] if args else kwargs.get("query")
            if not isinstance(first, Tensor) or first.dtype != torch.bfloat16:
                return function(*args, **kwargs)
            if function in products or function in attention:
                wide_kwargs = {name: wide(value) for name, value in kwargs.items()}
                return function(*map(wide, args), **wide_kwargs).to(torch.bfloat16)
            if function is Tensor.addmm_:
                product = torch.mm(wide(args[1]), wide(args[2]))
                return first.copy_(
                    first.float().mul_(kwargs.get("beta", 1)).add_(product, alpha=kwargs.get("alpha", 1))
                )
            return function(*args, **kwargs)

    return Emulated()


if __name__ == "__main__":
    if "--one-run" in sys.argv[1:2]:
        sys.exit(one_run(sys.argv[2:]))
    began = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - began:.0f} s", file=sys.stderr)
