"""Host memory while a run's model is built: what a process needs at most, beyond its imports.

    python benchmarks/build_memory.py --model_config configs/llama_350m.json --rank 256 lora lora,quantize=8bit
    torchrun --nproc-per-node 2 benchmarks/build_memory.py --layout fsdp lora

A METHOD[,FLAG=VALUE...] is built in float32, in a process of its own: the kernel keeps the highest value of a process's
life. Under torchrun, name a single one; the main process's number is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from real_updates import LAYOUTS, config_of  # noqa: E402

from peft_pretraining.distributed import ProcessGroup  # noqa: E402
from peft_pretraining.methods import load_method  # noqa: E402
from peft_pretraining.training.build import distributed_model  # noqa: E402

MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+", metavar="METHOD[,FLAG=VALUE...]")
    parser.add_argument("--model_config", default="configs/llama_350m.json")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--layout", default="ddp", choices=LAYOUTS)
    args = parser.parse_args()
    if len(args.methods) == 1:
        measure(args)
        return
    shared = ["--model_config", args.model_config, "--rank", str(args.rank), "--layout", args.layout]
    for method in args.methods:
        subprocess.run([sys.executable, __file__, *shared, method], check=True)


def measure(args: argparse.Namespace) -> None:
    """Build the model of one method and print what that took."""
    name, *pairs = args.methods[0].split(",")
    given = dict(pair.split("=", 1) for pair in pairs)
    flags = {flag: value == "True" if value in ("True", "False") else value for flag, value in given.items()}
    config = config_of(name, args.layout, rank=args.rank, **flags)
    shape = json.loads(Path(args.model_config).read_text())
    group = ProcessGroup.start()
    before = peak()
    model = distributed_model(config, shape, load_method(name)(config), group)
    needed = peak() - before
    count = sum(param.numel() for param in model.parameters())
    if group.is_main:
        print(
            f"{args.methods[0]}, {group.world_size} x {args.layout}: {needed / MB:,.0f} MB for {count / 1e6:,.0f}M",
            "parameters",
        )
    group.stop()


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
