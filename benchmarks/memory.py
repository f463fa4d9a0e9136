"""Bytes of tensors that live on one rank: weights, gradients, bases, other optimizer state, by method and layout.

    python benchmarks/memory.py [--ranks 1,2,4] [--model_config FILE.json] [--rank R] [--methods ...] [--out FILE.json]

Starts torchrun once for each number of ranks. Every method makes two updates on random tokens; what is measured is rank
0's share in the second, which refreshes nothing, when the gradients are complete and the optimizer has not stepped.
Frozen weights count as weights, the factor that GoLore's adapter form keeps frozen as a basis; SwitchLoRA's candidates,
which lie in host memory, have a column of their own. Activations, and weights that FSDP2 gathers for a moment,
are not counted; on CUDA the device's peak, which holds all of it, is another column.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from real_updates import LAYOUTS, Trainee  # noqa: E402

from peft_pretraining.distributed import ProcessGroup  # noqa: E402
from peft_pretraining.distributed.sharding import local  # noqa: E402
from peft_pretraining.methods import METHODS  # noqa: E402
from peft_pretraining.models.model_config import read_model_json  # noqa: E402
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT  # noqa: E402

COLUMNS = ("weights", "candidates", "gradients", "bases", "states")


def local_bytes(tensors) -> int:
    """Of the shares that are on this device."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def measure(name: str, layout: str, shape: dict, arguments: argparse.Namespace, group: ProcessGroup) -> dict:
    if group.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainee = Trainee.build(name, layout, shape, group, rank=arguments.rank, update_proj_gap=arguments.gap)
    held: dict[str, int] = {}

    def count() -> None:
        params = dict(trainee.model.named_parameters())
        frozen_factors = {key for key, param in params.items() if "lora_" in key and not param.requires_grad}
        state = [item for each in trainee.optimizer.state.values() for item in each.items()]
        in_state = trainee.model.state_dict().items()
        held.update(
            weights=local_bytes(param for key, param in params.items() if key not in frozen_factors),
            candidates=local_bytes(tensor for key, tensor in in_state if "candidates_" in key),
            gradients=local_bytes(param.grad for param in params.values() if param.grad is not None),
            bases=local_bytes(value for key, value in state if key in (LEFT, RIGHT))
            + local_bytes(params[key] for key in frozen_factors),
            states=local_bytes(value for key, value in state if key not in (LEFT, RIGHT)),
        )

    trainee.update(0)
    trainee.update(1, count)
    row = {"method": name, "layout": layout, "ranks": group.world_size}
    row |= {f"{column}_bytes": held[column] for column in COLUMNS} | {"total_bytes": sum(held.values())}
    if group.device.type == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return row


def run_one(arguments: argparse.Namespace) -> None:
    """Under torchrun: all methods and layouts on this many ranks."""
    group = ProcessGroup.start()
    shape = read_model_json(arguments.model_config, "--model_config", [])
    layouts = arguments.layouts.split(",") if group.world_size > 1 else ["ddp"]
    pairs = [(name, layout) for name in arguments.methods.split(",") for layout in layouts]
    rows = [measure(name, layout, shape, arguments, group) for name, layout in pairs]
    if group.is_main:
        Path(arguments.worker_out).write_text(json.dumps(rows))
    group.stop()


def launch(ranks: int, argv: list[str]) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run([*torchrun, __file__, *argv, "--worker_out", str(out)], check=True)
        return json.loads(out.read_text())


def print_table(rows: list[dict]) -> None:
    names = [name for name in rows[0] if name.endswith("_bytes")]
    print("| method | layout | ranks | " + " | ".join(f"{name[:-6]}, MB" for name in names) + " |")
    print("|---|---|---:|" + "---:|" * len(names))
    for row in sorted(rows, key=lambda row: list(METHODS).index(row["method"])):
        cells = " | ".join(f"{row[name] / 1e6:.2f}" for name in names)
        print(f"| {row['method']} | {row['layout'] if row['ranks'] > 1 else ''} | {row['ranks']} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", default="1,2,4", help="comma-separated numbers of processes")
    parser.add_argument("--model_config", default=str(ROOT / "configs" / "llama_9m.json"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gap", type=int, default=200, help="updates between two refreshes")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--layouts", default="ddp,fsdp", help=f"comma-separated, of {', '.join(LAYOUTS)}")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker_out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker_out:
        return run_one(arguments)
    problems: list[str] = []
    read_model_json(arguments.model_config, "--model_config", problems)
    if problems:
        raise SystemExit("\n".join(problems))
    rows = [row for ranks in arguments.ranks.split(",") for row in launch(int(ranks), sys.argv[1:])]
    print_table(rows)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
