"""Bytes that the ranks exchange per update, by method, layout and collective, counted in real updates.

    torchrun --standalone --nproc-per-node 2 benchmarks/communication.py [--model_config FILE.json] [--rank R] [--gap N]

Every method makes two updates on random tokens, the first of which refreshes bases where there are any. Bytes are those
of the whole tensors that one rank hands to a collective (all-reduce, reduce-scatter, all-to-all) or gets from it
(all-gather, all-to-all), whoever calls it: DDP's hook, FSDP2, DTensors, or the method; without a few scalars. The
average is over `--gap` updates, one of them a refresh. `calls` counts the collectives of the optimizer's step in an
ordinary update, scalars' included: after the passes, the gradient norm and what belongs to them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from real_updates import LAYOUTS, Trainee  # noqa: E402

from peft_pretraining.distributed import ProcessGroup  # noqa: E402
from peft_pretraining.methods import METHODS  # noqa: E402
from peft_pretraining.models.model_config import read_model_json  # noqa: E402
from peft_pretraining.training.loop import state_bytes  # noqa: E402

_LARGEST_SCALARS = 8
COLLECTIVES = {
    "all_reduce": ("allreduce_", "all_reduce", "all_reduce_"),
    "reduce_scatter": ("_reduce_scatter_base_", "reduce_scatter_tensor"),
    "all_gather": ("_allgather_base_", "all_gather_into_tensor"),
    "all_to_all": ("alltoall_base_", "all_to_all_single"),
}
"""What torch calls each of them, in its two libraries of collectives."""
_NO_TRAFFIC = ("wait_tensor", "_wrap_tensor_autograd", "broadcast_", "barrier")


class Exchanged(TorchDispatchMode):
    """Counts the bytes that go through collectives while it is active, by collective."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls, self.calls_before_step = 0, 0

    def step_begins(self) -> None:
        self.calls_before_step = self.calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._schema.name.split("::")[1]
            kind = next((kind for kind, names in COLLECTIVES.items() if name in names), None)
            if kind is None:
                assert name in _NO_TRAFFIC, f"collective {name} is not counted"
            else:
                self.calls += 1
                sizes = [item.numel() * item.element_size() for item in _tensors((args, result))]
                if max(sizes) > 8 * _LARGEST_SCALARS:
                    self.bytes[kind] += max(sizes)  # of the part and the whole, the whole
        return result


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for each in value for item in _tensors(each)] if isinstance(value, (tuple, list)) else []


def measure(name: str, layout: str, shape: dict, arguments: argparse.Namespace, group: ProcessGroup) -> dict:
    trainee = Trainee.build(name, layout, shape, group, rank=arguments.rank, update_proj_gap=arguments.gap)
    parallel = trainee.parallel_model
    if isinstance(parallel, DistributedDataParallel) and not parallel._comm_hooks:
        parallel.register_comm_hook(None, allreduce_hook)  # what DDP does anyway, where it can be counted
    exchanged = []
    for step in range(2):
        with Exchanged() as counter:
            trainee.update(step, counter.step_begins)
        exchanged.append(counter.bytes)
    refresh, ordinary = exchanged
    return {
        "method": name,
        "layout": layout,
        "trained_parameters": sum(param.numel() for param in trainee.model.parameters() if param.requires_grad),
        "optimizer_state_bytes": state_bytes(trainee.optimizer),
        **{f"{kind}_bytes": ordinary[kind] for kind in COLLECTIVES},
        "bytes_ordinary_update": ordinary.total(),
        "bytes_refresh_update": refresh.total(),
        "bytes_per_update": ordinary.total() + (refresh.total() - ordinary.total()) / arguments.gap,
        "calls": counter.calls - counter.calls_before_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_config", default=str(ROOT / "configs" / "llama_9m.json"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gap", type=int, default=200, help="updates between two refreshes")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--layouts", default="ddp,fsdp", help=f"comma-separated, of {', '.join(LAYOUTS)}")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    group, problems = ProcessGroup.start(), []
    shape = read_model_json(arguments.model_config, "--model_config", problems)
    if problems or group.world_size < 2:
        raise SystemExit("\n".join(problems) or "run under torchrun with at least two processes")
    pairs = [(name, layout) for layout in arguments.layouts.split(",") for name in arguments.methods.split(",")]
    rows = [measure(name, layout, shape, arguments, group) for name, layout in pairs]
    if group.is_main:
        print_table(rows)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")
    group.stop()


def print_table(rows: list[dict]) -> None:
    """Parameters in millions, bytes in MB."""
    kinds = " | ".join(kind.replace("_", "-") for kind in COLLECTIVES)
    print(f"| method | layout | trained, M | state | {kinds} | sum | refresh | average | calls |")
    print(f"|---|---|{'--:|' * (6 + len(COLLECTIVES))}")
    for row in rows:
        name, layout, *numbers, calls = row.values()
        print(f"| {name} | {layout} | " + " | ".join(f"{value / 1e6:.2f}" for value in numbers) + f" | {calls} |")


if __name__ == "__main__":
    main()
