"""ReLoRA: LoRA whose factors are merged into the weights and drawn anew every N updates.

Lialin et al., arXiv 2307.05695, section 3. The sum of many low-rank updates can have a high rank.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from peft_pretraining import rng
from peft_pretraining.distributed.gathering import copy_to_shard
from peft_pretraining.methods._factors.method import FactorMethod
from peft_pretraining.nn import LowRankLinear, low_rank_layers
from peft_pretraining.nn.initialization import draw_kaiming_a
from peft_pretraining.optim.state import state_reset


class ReLoRA(FactorMethod):
    def before_update(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Between two updates: the first update after a merge is the one at which a cycle of the schedule begins."""
        super().before_update(model, optimizer, step)
        t = self.own_time(step)
        if t == 0:
            return
        merge_every = self.config.method.relora
        reset_every = self.config.schedule.cycle_length or merge_every
        layers = low_rank_layers(model)
        if t % merge_every == 0:
            for index, layer in enumerate(layers.values()):
                self.restart_layer(layer, step, index)
        if t % reset_every == 0:
            self.reset_moments(optimizer, list(layers.values()), step)

    def restart_layer(self, layer: LowRankLinear, step: int, index: int) -> None:
        """W ← W + s·B·A, A drawn anew, B ← 0, a trained scale back at 1 (with 0, as in older code, it would stay 0)."""
        layer.merge()
        with torch.no_grad():
            copy_to_shard(layer.lora_A, self.draw_a(layer, step, index))
            if layer.scaling is not None:
                layer.scaling.fill_(1.0)

    def draw_a(self, layer: LowRankLinear, step: int, index: int) -> torch.Tensor:
        """The A (r, n) with which a layer goes on after a merge."""
        return draw_kaiming_a(layer, rng.generator(self.config.run.seed, "restarted factors", step, index))

    def reset_moments(self, optimizer: Optimizer, layers: list[LowRankLinear], step: int) -> None:
        """Zero the moments of A and B, or part of them; step counts stay."""
        settings, seed = self.config.method, self.config.run.seed
        for index, param in enumerate(factor for layer in layers for factor in (layer.lora_A, layer.lora_B)):
            state = optimizer.state[param]
            if settings.optimizer_random_pruning:
                generator = rng.generator(seed, "pruned moments", step, index)
                state_reset.prune_randomly(state, settings.optimizer_random_pruning, generator)
            if settings.reset_optimizer_on_relora:
                state_reset.zero_moments(state)
            elif settings.optimizer_magnitude_pruning:
                state_reset.prune_by_magnitude(state, settings.optimizer_magnitude_pruning)
