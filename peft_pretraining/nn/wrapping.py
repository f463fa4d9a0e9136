"""Layers with factors in a model: put in, found again, and merged into the plain model's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_pretraining.distributed.gathering import on_main
from peft_pretraining.models.targets import as_linear, target_linears
from peft_pretraining.nn.low_rank_linear import LowRankLinear


def wrap_linears(
    model: nn.Module, target_modules: Sequence[str], wrap: Callable[[nn.Linear, int], LowRankLinear]
) -> dict[str, LowRankLinear]:
    """Replace every target layer of `model` by `wrap(layer, its index)`; returns the new layers by name.

    Raises `TargetError` where `target_linears` does.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sorted(wrap_linears(model, ["0", "2"], lambda linear, index: LowRankLinear(linear, rank=4, scale=1.0)))
    ['0', '2']
    >>> model[2].rank
    2
    """
    for index, name in enumerate(list(target_linears(model, target_modules))):  # names: each layer goes when replaced

        def make(linear: nn.Linear, index: int = index) -> LowRankLinear:
            return wrap(linear, index)

        replace_linear(model, name, make)
    return low_rank_layers(model)


def replace_linear(model: nn.Module, name: str, wrap: Callable[[nn.Linear], LowRankLinear]) -> None:
    """Replace the linear layer `name` of `model` by what `wrap` makes of it."""
    module = model.get_submodule(name)
    assert isinstance(module, (nn.Linear, Conv1D)), f"{name} is no linear layer"
    linear = as_linear(module)
    layer = wrap(linear)
    layer.turned = linear is not module
    model.set_submodule(name, layer)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers with factors by dotted name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of the plain model that computes the same function, under plain names. Changes nothing.

    Merged weights are on the CPU: on the device there may be no room for a second copy. Those of a sharded model are
    gathered one by one, and only the main process keeps them.

    >>> model = nn.Sequential(nn.Linear(8, 2))
    >>> _ = wrap_linears(model, ["0"], lambda linear, index: LowRankLinear(linear, rank=4, scale=1.0))
    >>> sorted(merged_state_dict(model))
    ['0.bias', '0.weight']
    """
    layers = low_rank_layers(model)
    prefixes = tuple(f"{name}." for name in layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    for name, layer in layers.items():
        merged = on_main(layer.merged_weight())
        state[f"{name}.weight"] = merged.T.contiguous() if layer.turned and merged.ndim == 2 else merged
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()
    return state
