"""How far merges, switches and new bases move the function that they are to keep, by what rounding adds up to.

    python benchmarks/weight_drift.py --updates 1000

One layer (m, n) is trained on random inputs. Each time a method changes W, W + s·B·A is taken before and after, in
float64; the drift is the norm of the sum of all these differences over the norm of W. "Rounded" is a W that keeps
nothing of what rounding takes from it, as a plain bfloat16 weight does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from peft_pretraining.config import Config  # noqa: E402
from peft_pretraining.methods import load_method  # noqa: E402
from peft_pretraining.methods.base import TrainingMethod  # noqa: E402
from peft_pretraining.nn import LowRankLinear  # noqa: E402
from peft_pretraining.optim.state.gradient_owner import gradient_owner  # noqa: E402

SCALE = {"lora_alpha": 1.0, "init_lora_type": "switchlora"}
METHODS = {
    "switchlora, defaults": {"method": "switchlora", **SCALE},
    "switchlora, fixed interval 40": {"method": "switchlora", "fix_switch_lora_interval": True, **SCALE},
    "relora, merges every 10": {"method": "relora", "relora": 10},
    "golore_adapter, bases every 10": {"method": "golore_adapter", "update_proj_gap": 10, "scale": 0.25},
}


def effective(layer: LowRankLinear) -> Tensor:
    """W + s·B·A (m, n) in float64."""
    return layer.exact_weight().double() + layer.delta_weight().double()


def drift(flags: dict[str, object], dtype: torch.dtype, keep_rest: bool, size: int, updates: int, lr: float) -> float:
    """The norm of all changes of the function that one method's corrections of W make, over the norm of W."""
    torch.manual_seed(0)
    rank = size // 8
    common = {"rank": rank, "num_training_steps": updates, "lr": lr, "target_modules": ("mlp",)}
    config = Config.from_settings({**common, **flags})
    model = nn.ModuleDict({"mlp": nn.Linear(size, size, bias=False, dtype=dtype)})
    method = load_method(config.method.method)(config)
    model = method.convert(model)
    layer = model["mlp"]
    if not keep_rest:
        layer._rest = None
    optimizer = method.build_optimizer(model)
    method.prepare(model, optimizer, lambda tensor: tensor)
    start, moved = effective(layer), torch.zeros(size, size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for step in range(updates):
        moved += _update(method, model, optimizer, step, generator)
    return float(moved.norm() / start.norm())


def _update(
    method: TrainingMethod,
    model: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    step: int,
    generator: torch.Generator,
) -> Tensor:
    """One update; how the method changed the function besides the optimizer."""
    layer = model["mlp"]
    before = effective(layer)
    gradients = gradient_owner(optimizer, model)
    gradients.begin_update(step)
    method.before_update(model, optimizer, step)
    moved = effective(layer) - before
    x = torch.randn(32, layer.in_features, generator=generator).to(layer.lora_A.dtype)
    target = torch.randn(32, layer.out_features, generator=generator).to(x.dtype)
    (layer(x) - target).square().mean().backward()
    gradients.grad_norm()
    before = effective(layer)
    method.before_step(model, optimizer, step)
    moved += effective(layer) - before
    optimizer.step()
    optimizer.zero_grad()
    return moved


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--size", type=int, default=128, help="of the square layer")
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args(argv)
    columns = (("bfloat16, rounded", torch.bfloat16, False), ("bfloat16", torch.bfloat16, True))
    columns = (*columns, ("float32", torch.float32, True))
    print(f"{'drift of W + s·B·A':32}" + "".join(f"{name:>20}" for name, *_ in columns))
    for name, flags in METHODS.items():
        sizes = [
            drift(flags, dtype, keep, arguments.size, arguments.updates, arguments.lr) for _, dtype, keep in columns
        ]
        print(f"{name:32}" + "".join(f"{size:20.1e}" for size in sizes), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
