"""GoLore's adapter form for other people's training loops, under the names of its public code.

    model = ReLoRaModel(model, r=128, lora_dropout=0, target_modules=["attn", "attention", "mlp"], scale=1.0,
                        keep_original_weights=True, lora_only=False, quantize=None, use_double_quant=False)
    model._config.forward_type = reset_now        # True: this update gathers the full gradient
    ...                                           # forward, backward
    if reset_now: model.merge_and_reinit(optimizer, use_rand)   # between backward and step

`torchrun_main.py --use_peft True --Golore` does the same by itself (methods/golore_adapter/method.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed import mean_over_processes
from peft_pretraining.nn import LowRankLinear, merged_state_dict, wrap_linears
from peft_pretraining.nn.adapter_subspace import AdapterSubspace
from peft_pretraining.optim.basis.bases import SVDThenRandom
from peft_pretraining.optim.basis.subspace import Subspace
from peft_pretraining.optim.rules.update_rule import UpdateRule


class ReLoRaLinear(LowRankLinear):
    """The layer that `ReLoRaModel` puts in place of a linear one."""


class ReLoRaModel(nn.Module):
    """A model whose target layers are frozen and trained through GoLore's factors (arXiv 2410.11289).

    r: rank, at most a layer's smaller side. scale: s. The random bases are functions of (seed, layer's name, number of
    refreshes so far), equal on all ranks. The weights are needed for the full gradient, so `lora_only=True`,
    `keep_original_weights=False` and `quantize` raise `ValueError`.

    >>> model = ReLoRaModel(nn.Sequential(nn.Linear(8, 4)), r=2, target_modules=["0"])
    >>> trained = [param for param in model.parameters() if param.requires_grad]  # one factor of each layer, and biases
    >>> optimizer = torch.optim.SGD(trained, lr=0.1)
    >>> x = torch.randn(16, 8)
    >>> before = model.merged_state_dict()["0.weight"].clone()
    >>> for step in range(4):
    ...     model._config.forward_type = reset_now = step % 2 == 0
    ...     model(x).square().mean().backward()
    ...     if reset_now:
    ...         model.merge_and_reinit(optimizer, use_rand=False)
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> int(model.refreshes)
    2
    >>> bool((model.merged_state_dict()["0.weight"] != before).any())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        r: int = 128,
        lora_dropout: float = 0.0,
        target_modules: Sequence[str] = ("attn", "attention", "mlp"),
        scale: float = 1.0,
        keep_original_weights: bool = True,
        lora_only: bool = False,
        quantize: str | None = None,
        use_double_quant: bool = False,
        seed: int = 42,
        svd_method: str = "gram",
    ):
        super().__init__()
        self.refreshes: Tensor
        if lora_only or not keep_original_weights:
            raise ValueError("lora_only=True and keep_original_weights=False drop the weights that a refresh changes")
        if quantize or use_double_quant:
            raise ValueError(f"quantize={quantize!r}: every refresh would round the weights again")
        if r <= 0:
            raise ValueError(f"r must be a positive integer, got {r}")
        self.wrapped_model = model
        self._config = SimpleNamespace(forward_type=False, r=r, scale=scale, target_modules=tuple(target_modules))
        layers = wrap_linears(
            model,
            target_modules,
            lambda linear, index: ReLoRaLinear(linear, r, -scale, dropout=lora_dropout, corrected=True),
        )
        settings = {"rank": r, "proj_type": "std", "update_proj_gap": 1, "stagger_refresh": False, "seed": seed}
        settings |= {"svd_method": svd_method, "rand_ratio": 0.0, "num_training_steps": 1}
        peers: list[Subspace] = []
        self._adapters = [AdapterSubspace(layer, name, settings, peers) for name, layer in layers.items()]
        self._counters = [adapter.new_counters() for adapter in self._adapters]
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        wanted = bool(self._config.forward_type) and self.training
        for adapter in self._adapters:
            if wanted != (adapter.layer.full_gradient is not None):
                adapter.gather(wanted)
        return self.wrapped_model(*args, **kwargs)

    def merge_and_reinit(self, optimizer: Any, use_rand: bool) -> None:
        """W ← W - s·A·B, new bases (of the gathered gradients, or random ones), momentum carried over, factors at zero.

        Between the backward passes of an update that had `forward_type` set and `optimizer.step()`. `optimizer` may be
        wrapped (accelerate's `.optimizer`); its state is looked for under `exp_avg` or `momentum_buffer`.
        """
        if any(adapter.layer.full_gradient is None for adapter in self._adapters):
            raise RuntimeError("merge_and_reinit needs a full gradient: set model._config.forward_type before forward")
        optimizer = getattr(optimizer, "optimizer", optimizer)
        step = int(self.refreshes)
        for adapter, counters in zip(self._adapters, self._counters, strict=True):
            counters["refreshes"].fill_(step)  # the buffer is what is saved
            counters["last_refresh"].fill_(step - 1)
            rule = adapter.subspace.rule
            assert isinstance(rule, SVDThenRandom)
            rule.rand_ratio = 0.0 if use_rand else 2.0
            adapter.reduce_gathered(mean_over_processes)
            adapter.project(counters, step)
            moments = optimizer.state.get(adapter.trained, {})
            adapter.apply({**counters, **moments}, step, _first_moment_of(moments), {})
        self.refreshes += 1
        self._config.forward_type = False

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The plain model's weights."""
        return merged_state_dict(self.wrapped_model)

    def save_pretrained(self, folder: str | Path, **settings: Any) -> None:
        """Write the merged, plain model, as transformers' own `save_pretrained` would."""
        model: Any = self.wrapped_model
        model.save_pretrained(folder, state_dict=self.merged_state_dict(), **settings)


def _first_moment_of(state: dict[str, Any]) -> UpdateRule:
    """An update rule that knows where this optimizer keeps its first moment."""
    rule = UpdateRule()
    rule.first_moment = "momentum_buffer" if state.get("momentum_buffer") is not None else "exp_avg"
    return rule
