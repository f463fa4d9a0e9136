"""Model FLOPs utilisation (MFU): how much of a GPU's peak the products of the model's forward and backward pass take.

As in PaLM's paper (arXiv 2204.02311, appendix B): 6 FLOPs per weight and token, and 12 per pair of positions and width
of attention, of which causal kernels skip up to half. It counts the model, not what a method adds (factors, bases) or
recomputes, so that methods can be compared.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_pretraining.config import Config
from peft_pretraining.runtime.devices import GIB, device_of_driver


def flops_per_token(shape: Any, length: int) -> int:
    """Of a forward and a backward pass over sequences of `length` tokens; `shape` is transformers' `LlamaConfig`."""
    width, heads = shape.hidden_size, shape.num_attention_heads
    head = getattr(shape, "head_dim", None) or width // heads
    attention = 2 * width * head * (heads + (getattr(shape, "num_key_value_heads", None) or heads))
    weights = shape.num_hidden_layers * (attention + 3 * width * shape.intermediate_size) + width * shape.vocab_size
    return 6 * weights + 12 * shape.num_hidden_layers * heads * head * length


def peak_flops(device: torch.device, config: Config) -> float | None:
    """FLOP/s that a GPU's data sheet gives for products in the run's dtype; None on other devices and unknown GPUs."""
    if device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    sheet = device_of_driver(torch.cuda.get_device_name(device), memory)
    precision = config.resolved_precision(device.type)
    if sheet is None:
        return None
    return sheet.tflops(precision.compute_dtype, torch.get_float32_matmul_precision()) * 1e12


class Utilisation:
    """MFU of a run's updates."""

    def __init__(self, config: Config, shape: Any, device: torch.device):
        length = config.data.max_length
        assert length is not None, "derived when the command line was checked"
        peak = peak_flops(device, config)
        self._of_rate = peak and flops_per_token(shape, length) / (peak * config.batch.world_size)

    def of(self, tokens_per_second: float) -> dict[str, float]:
        """For the record of an update; nothing where the device's peak is unknown."""
        return {"mfu": tokens_per_second * self._of_rate} if self._of_rate else {}
