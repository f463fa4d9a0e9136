"""Parameter groups of a whole model: what is projected, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_pretraining.models.targets import target_linears

TARGET_MODULES = ("attn", "attention", "mlp")
"""Parts of the names of attention layers and MLPs, as pre-training has them."""


def model_groups(model: nn.Module, target_modules: Sequence[str], projection: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of named parameters that are trained: those that are updated as they are, and the weights of the target
    layers with the settings of `projection`. Raises `ValueError` if no trained layer matches."""
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    targets = {linear.weight for linear in target_linears(model, names).values()}
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    projected = [(name, param) for name, param in trained if param in targets]
    if not projected:
        raise ValueError(f"target_modules {','.join(names)}: the weights of these layers are frozen")
    regular = [(name, param) for name, param in trained if param not in targets]
    groups = [{"params": regular}] if regular else []
    return [*groups, {"params": projected, **projection}]
