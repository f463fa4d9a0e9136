"""Methods, some of them no part of the package, on a small model: in one process, or under torchrun divided by FSDP2.

    torchrun --nproc-per-node 2 optimizer_trial_ranks.py FOLDER

writes `rank{N}.pt`: for each case the weights after the last update, and the number of collectives of each step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import helpers  # noqa: F401 - the project's folder comes into the path
import torch
from collectives import _Counting
from optim_trials.apollo import GaussianProjection, ScaledGradient
from optim_trials.frugal import Frugal
from optim_trials.ldadam import LDAdam
from optim_trials.soap import Soap
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from peft_pretraining.methods.alice import method as alice
from peft_pretraining.methods.apollo import method as apollo
from peft_pretraining.methods.fira.method import ScaledResidual
from peft_pretraining.methods.foam.method import FoldedAdam
from peft_pretraining.methods.frugal.method import PartialAdam
from peft_pretraining.methods.ldadam import method as ldadam
from peft_pretraining.methods.racs.method import RowsAndColumns
from peft_pretraining.optim import LowRankOptimizer

UPDATES = 6
SHAPES = ((12, 8), (8, 12), (8, 8))
LOW_RANK = {"rank": 3, "update_proj_gap": 4}
ROUNDED = {"rounding": "stochastic", "seed": 3, "dtype": torch.bfloat16}
"""Without clipping: the norm's last digit depends on the order in which it is summed."""
CASES = {
    "apollo": lambda: {**LOW_RANK, "lift": ScaledGradient(), "basis": GaussianProjection()},
    "apollo mini": lambda: {
        **{"rank": 1, "update_proj_gap": 4, "basis": GaussianProjection()},
        "lift": ScaledGradient(128.0, "tensor"),
    },
    "soap": lambda: {"rule": Soap(gap=2)},
    "ldadam": lambda: {"rule": LDAdam(rank=3)},
    "frugal": lambda: {"rule": Frugal(density=0.34, gap=2)},
    "fira": lambda: {**LOW_RANK, "lift": ScaledResidual()},
    "apollo, built in": lambda: {**LOW_RANK, "lift": apollo.ScaledGradient(), "basis": apollo.GaussianProjection()},
    "apollo mini, built in": lambda: {
        **{"rank": 1, "update_proj_gap": 4, "basis": apollo.GaussianProjection(), "scale": 128.0},
        "lift": apollo.ScaledGradient("tensor"),
    },
    "foam": lambda: {"rule": FoldedAdam(), "rows": True},
    "racs": lambda: {"rule": RowsAndColumns()},
    "racs, divided by rows": lambda: {"rule": RowsAndColumns(), "rows": True},
    "alice": lambda: {**LOW_RANK, **alice.objects(1, 0.4, 0.9, 1.01)},
    "ldadam, built in": lambda: ldadam.objects(rank=3),
    "frugal, built in": lambda: {"rule": PartialAdam(density=0.34, gap=2)},
    "adafactor": lambda: {**LOW_RANK, "rule": "adafactor"},
    "adafactor, both sides": lambda: {**LOW_RANK, "rule": "adafactor", "proj_type": "full"},
    "online PCA": lambda: {**LOW_RANK, "proj_type": "continuous"},
    "online PCA, divided by rows": lambda: {**LOW_RANK, "proj_type": "continuous", "rows": True},
    "golore": lambda: {**LOW_RANK, "rand_ratio": 0.5, "num_training_steps": UPDATES},
    "torch's AdamW": lambda: {"rule": "torch_adamw"},
    "bfloat16, torch's AdamW": lambda: {"rule": "torch_adamw", "state_format": "weight", **ROUNDED},
    "bfloat16, SGD": lambda: {"rule": "sgd", "momentum": 0.9, "state_format": "float32", **ROUNDED},
    "bfloat16, GaLore": lambda: {**LOW_RANK, "state_format": "float32", "rand_ratio": 0.0, **ROUNDED},
}


def longer_side(param):
    return Shard(0 if param.shape[0] > param.shape[1] else 1)


def train(settings, divided):
    """The weights after the last update, and the number of collectives of each step."""
    torch.manual_seed(0)
    by_rows, dtype = settings.pop("rows", False), settings.pop("dtype", torch.float64)
    model = nn.Sequential(*[nn.Linear(n, m, bias=False, dtype=dtype) for m, n in SHAPES])
    if divided:
        fully_shard(model, shard_placement_fn=(lambda param: Shard(0)) if by_rows else longer_side)
    optimizer = LowRankOptimizer([{"params": list(model.named_parameters()), **settings}], lr=0.01, weight_decay=0.1)
    counts = []
    for step in range(UPDATES):
        optimizer.begin_update(step)
        for index, layer in enumerate(model):
            generator = torch.Generator().manual_seed(10 * step + index)
            x = torch.randn(16, layer.in_features, generator=generator, dtype=torch.float64)
            layer.weight.grad = None
            full = (x.T @ torch.randn(16, layer.out_features, generator=generator, dtype=torch.float64)).T.contiguous()
            full = full.to(dtype)
            if divided:
                layer.weight.grad = distribute_tensor(full, layer.weight.device_mesh, layer.weight.placements)
            else:
                layer.weight.grad = full
        norm = optimizer.grad_norm()
        if dtype == torch.float64:
            optimizer.scale_((5.0 / norm).clamp(max=1.0))
        with _Counting() as counting:
            optimizer.step()
        counts.append(sum(counting.calls.values()))
    weights = [param.full_tensor() if divided else param for param in model.parameters()]
    return [weight.detach().clone() for weight in weights], counts


def main(folder: Path) -> None:
    divided = "RANK" in os.environ
    if divided:
        dist.init_process_group("gloo")
    results = {name: train(case(), divided) for name, case in CASES.items()}
    torch.save(results, folder / f"rank{os.environ.get('RANK', 0)}.pt")
    if divided:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
