"""Trained parameters, optimizer state, and bytes that the ranks reduce per update, by method, counted in real updates.

    torchrun --standalone --nproc-per-node 2 benchmarks/communication.py [--model_config FILE.json] [--rank R] [--gap N]

Every method makes two updates on random tokens, the first of which refreshes bases where there are any. Bytes are those
of one rank's tensors handed to all-reduce (through the DDP hook and by the method itself), without a few scalars. The
last column averages over `--gap` updates, one of them a refresh.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from peft_pretraining.config import Config  # noqa: E402
from peft_pretraining.distributed import ProcessGroup, parallelize  # noqa: E402
from peft_pretraining.loss import token_loss_sum  # noqa: E402
from peft_pretraining.methods import METHODS, load_method  # noqa: E402
from peft_pretraining.model_config import read_model_json  # noqa: E402
from peft_pretraining.models.llama import build_model  # noqa: E402

_LARGEST_SCALARS = 8
SETTINGS = {"relora": {"relora": 200}, "switchlora": {"lora_alpha": 1.0, "init_lora_type": "switchlora"}}


class Counter:
    """Counts the bytes that go through `torch.distributed.all_reduce`."""

    def __init__(self):
        self.bytes, self._all_reduce = 0, dist.all_reduce
        dist.all_reduce = self

    def __call__(self, tensor, *args, **settings):
        if tensor.numel() > _LARGEST_SCALARS:
            self.bytes += tensor.numel() * tensor.element_size()
        return self._all_reduce(tensor, *args, **settings)


def measure(name: str, shape: dict, arguments: argparse.Namespace, group: ProcessGroup, counter: Counter) -> dict:
    settings = {"method": name, "rank": arguments.rank, "update_proj_gap": arguments.gap, **METHODS[name].defaults}
    config = Config.from_settings({**settings, **SETTINGS.get(name, {}), "dtype": "float32"})
    method = load_method(name)(config)
    model = method.convert(build_model(config.model, shape, None, group.device, config.run.seed))
    optimizer = method.build_optimizer(model)
    method.prepare(model, optimizer, group.all_reduce_mean)
    low_rank = method.low_rank_reduction(model, optimizer)
    parallel = parallelize(model, group, low_rank)
    if low_rank is None:
        parallel.register_comm_hook(None, allreduce_hook)  # what DDP does anyway, where it can be counted
    sent = []
    for step in range(2):
        before = counter.bytes
        method.before_forward(model, optimizer, step)
        tokens = torch.randint(0, shape["vocab_size"], (1, 16), generator=torch.Generator().manual_seed(step))
        token_loss_sum(parallel, {"input_ids": tokens.to(group.device)}).backward()
        method.grad_norm(model, optimizer)
        method.before_optimizer_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        sent.append(counter.bytes - before)
    state = sum(value.numel() * value.element_size() for each in optimizer.state.values() for value in each.values())
    return {
        "method": name,
        "trained_parameters": sum(param.numel() for param in model.parameters() if param.requires_grad),
        "optimizer_state_bytes": state,
        "bytes_ordinary_update": sent[1],
        "bytes_refresh_update": sent[0],
        "bytes_per_update": sent[1] + (sent[0] - sent[1]) / arguments.gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_config", default=str(ROOT / "configs" / "llama_9m.json"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gap", type=int, default=200, help="updates between two refreshes")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    group, problems = ProcessGroup.start(), []
    shape = read_model_json(arguments.model_config, "--model_config", problems)
    if problems or group.world_size < 2:
        raise SystemExit("\n".join(problems) or "run under torchrun with at least two processes")
    counter = Counter()
    rows = [measure(name, shape, arguments, group, counter) for name in METHODS]
    if group.is_main:
        print("| method | trained parameters, M | optimizer state, MB | MB reduced: ordinary | refresh | on average |")
        print("|---|---:|---:|---:|---:|---:|")
        for row in rows:
            name, trained, *in_bytes = row.values()
            print(f"| {name} | {trained / 1e6:.2f} | " + " | ".join(f"{value / 1e6:.2f}" for value in in_bytes) + " |")
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")
    group.stop()


if __name__ == "__main__":
    main()
