"""The layers that low-rank methods act on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peft_pretraining.flags import ConfigError


def target_linears(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """Every `nn.Linear` whose dotted name contains one of `target_modules`, by name, in the model's order."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(target in name for target in target_modules)
    }
    if not found:
        raise ConfigError([f"--target_modules {','.join(target_modules)}: no linear layer has such a name"])
    return found
