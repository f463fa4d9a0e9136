"""The factors of a checkpoint as an adapter that PEFT loads, and the base model that it stands on.

    OUT/
      adapter_config.json, adapter_model.safetensors   A and B of every layer, as `PeftModel.from_pretrained` reads them
      tokenizer files, README.md
      base/                                            a plain LLaMA: everything without factors as it was trained, and
                                                       the frozen weights W below them

PEFT computes y = x Wᵀ + (lora_alpha / r) · (x Aᵀ) Bᵀ, which is what the layers here do (nn/low_rank_linear.py). The
files are written without PEFT, which need not be installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_pretraining.exporting.trained import Trained
from peft_pretraining.flags import ConfigError
from peft_pretraining.nn import LowRankLinear, low_rank_layers

BASE = "base"
"""The base model's folder in the adapter's."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""Of a weight's name in an adapter: `PeftModel`, and in it `LoraModel`."""


def factors_of(trained: Trained) -> dict[str, LowRankLinear]:
    """The layers with factors by name. Raises `ConfigError` where the method has none."""
    if layers := low_rank_layers(trained.model):
        return layers
    raise ConfigError(
        [f"--adapter: method {trained.config.method.method} trains whole weights, not factors beside them"]
    )


def base_model(trained: Trained, dtype: torch.dtype | None) -> PreTrainedModel:
    """The plain model below the factors, rounded to `dtype` (None: that of training). Its plain model is used up."""
    trained.widen(dtype)
    layers = factors_of(trained)
    inside = tuple(f"{name}." for name in layers)
    weights = {name: tensor for name, tensor in trained.model.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        weights[f"{name}.weight"] = layer.dense_weight().detach()
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias.detach()
    return trained.filled(weights, dtype)


def write_adapter(trained: Trained, base: PreTrainedModel, out: Path) -> None:
    """Write the adapter's own two files into `out`; they name `out/base`, where `base` is to be found."""
    layers = factors_of(trained)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            weight = getattr(layer, factor).detach().to(base.dtype)
            tensors[f"{_PREFIX}{name}.{factor}.weight"] = weight.contiguous()
    save_file(tensors, out / _WEIGHTS, metadata={"format": "pt"})
    described = {"base_model_name_or_path": str((out / BASE).resolve()), **adapter_config(layers, base)}
    (out / _CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def adapter_config(layers: dict[str, LowRankLinear], base: nn.Module) -> dict[str, Any]:
    """What PEFT's `LoraConfig` has to know: rank and scale of most layers, and those of the others by name."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _alpha(layer) for name, layer in layers.items()}
    rank, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {re.escape(name): other for name, other in alphas.items() if other != alpha},
        "target_modules": _targets(layers, base),
        "lora_dropout": next(iter(layers.values())).dropout.p,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _alpha(layer: LowRankLinear) -> float | int:
    """The number whose quotient by the rank is the layer's scale; a whole one as PEFT's own are."""
    scale = layer.current_scale()
    alpha = (scale.item() if isinstance(scale, Tensor) else scale) * layer.rank
    return int(alpha) if alpha.is_integer() else alpha


def _most_frequent(values: Iterable[Any]) -> Any:
    found = list(values)
    return max(dict.fromkeys(found), key=found.count)


def _targets(layers: dict[str, LowRankLinear], base: nn.Module) -> list[str]:
    """The layers' last names, as programs expect them, unless these name other layers as well."""
    last = {name.rpartition(".")[2] for name in layers}
    named = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if named == set(layers) else layers)
