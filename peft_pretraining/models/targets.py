"""The layers that low-rank methods act on: which of a model's linear layers a list of names means."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("peft_pretraining")

DEFAULT_TARGETS = ("attn", "attention", "mlp")
"""What `--target_modules` and `GoLore.ReLoRaModel` mean unless told otherwise: what blocks consist of."""

_SYNONYMS = ({"attn", "attention"},)
"""Names that different models use for one thing: it is enough that one of those that are given matches."""


class TargetError(ValueError):
    """Names that do not mean layers which can be trained in a method's way."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is y = x Wᵀ + bias: `nn.Linear`, or transformers' `Conv1D` (GPT-2), which stores Wᵀ."""
    return isinstance(module, (nn.Linear, Conv1D))


def as_linear(module: nn.Linear | Conv1D) -> nn.Linear:
    """The `nn.Linear` that computes the same: itself, or one with a `Conv1D`'s weight turned round (a copy)."""
    if isinstance(module, nn.Linear):
        return module
    n, m = module.weight.shape
    linear = nn.Linear(n, m, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
    linear.bias = module.bias
    return linear


def target_linears(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers whose dotted name contains one of `target_modules`, by name, in the model's order.

    Every name has to match a layer (of `attn` and `attention`, which mean the same, one has to; of the names in
    `DEFAULT_TARGETS` together some do, and the others are logged), and a layer's weight must not be another module's,
    too, as that of a tied head is the embedding's. Raises `TargetError`, a `ValueError`, otherwise.

    >>> model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    >>> list(target_linears(model, ["mlp"]))
    ['mlp.0', 'mlp.1']
    """
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not wanted or not all(isinstance(name, str) and name for name in wanted):
        raise TargetError(f"target_modules must be names of linear layers, got {target_modules!r}")
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    matches = {target: [name for name in linears if target in name] for target in wanted}
    if lost := [target for target in wanted if not matches[target] and not _has_synonym(target, matches)]:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none at all"
        if set(wanted) != set(DEFAULT_TARGETS) or not any(matches.values()):
            raise TargetError(f"{', '.join(lost)}: no linear layer has such a name; there are {kinds}")
        log.warning("target modules: no linear layer is named %s; there are %s", ", ".join(lost), kinds)
    found = {name: module for name, module in linears.items() if any(name in names for names in matches.values())}
    for name, other in shared_weights(model).items():
        if name in found:
            target = next(target for target in wanted if name in matches[target])
            raise TargetError(
                f"{target}: the weight of {name} is also that of {other} (tie_word_embeddings), where it is trained as "
                "it is: leave the name out, or untie the two"
            )
    return found


def shared_weights(model: nn.Module) -> dict[str, str]:
    """The linear layers whose weight another module holds, too, each with that module's name."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    found = {}
    for name, module in model.named_modules():
        if is_linear(module):
            others = [other for other in owners[id(module.weight)] if other != name]
            if others:
                found[name] = others[0]
    return found


def _has_synonym(target: str, matches: dict[str, list[str]]) -> bool:
    return any(matches.get(other) for names in _SYNONYMS if target in names for other in names)
