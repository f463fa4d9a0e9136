"""SwitchLoRA: vectors of the factors are exchanged, a few in every update, against candidates from a pool.

arXiv 2406.06564. An exchanged row of A resets and freezes the matching column of B for a few updates, and the other way
round: its gradient was computed with the vector that has gone. The newcomer keeps the optimizer state of its slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_pretraining import rng
from peft_pretraining.distributed.sharding import ShardInfo, local, whole_norm
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods._factors.method import FactorMethod
from peft_pretraining.methods.switchlora.schedule import SwitchSchedule, allowed_count
from peft_pretraining.nn import low_rank_layers
from peft_pretraining.nn.exchange import exchange
from peft_pretraining.nn.switching import Switch, SwitchedLinear, SwitchState
from peft_pretraining.optim.tensors.zeroing import Vectors, zero_vectors
from peft_pretraining.optim.vector_adamw import VectorAdamW
from peft_pretraining.optim.vector_adamw8bit import VectorAdamW8bit

if TYPE_CHECKING:
    from peft_pretraining.config import Config

_VECTORS = {"lora_A": 0, "lora_B": 1}
"""Along which dimension a factor's vectors lie."""


class SwitchLoRA(FactorMethod):
    def __init__(self, config: Config):
        super().__init__(config)
        self.uniform: Callable[[int, int], float] = self.draw_uniform
        """(update, layer) -> a number in [0, 1) that rounds the count of switches; tests put in their own."""
        self._layers: list[SwitchedLinear] | None = None

    def prepare(self, model: nn.Module, optimizer: Any, reduce: Callable[[Tensor], Tensor]) -> None:
        super().prepare(model, optimizer, reduce)
        self._layers = switched_layers(model)

    def before_update(self, model: nn.Module, optimizer: VectorAdamW, step: int) -> None:
        super().before_update(model, optimizer, step)
        optimizer.reported = {"switched_vectors": 0}  # an update that is skipped switches nothing

    def wrap(self, linear: nn.Linear, index: int, name: str) -> SwitchedLinear:
        settings, seed = self.config.method, self.config.run.seed
        layer = SwitchedLinear(linear, settings.rank, self.scale, dropout=settings.lora_dropout, corrected=True)
        state = SwitchState(layer, offload=not settings.no_offload_candidates)
        generator = rng.generator(seed, "candidates", index=index)
        state.fill(layer, settings.init_lora_type, generator, settings.zero_init_B, settings.discontinuous_switch)
        layer.add_candidates(state)
        return layer

    def build_optimizer(self, model: nn.Module) -> VectorAdamW:
        for name, layer in low_rank_layers(model).items():
            if ShardInfo.of(layer.lora_A).dim == 0:  # FSDP2 divides columns evenly only
                raise ConfigError(
                    [
                        f"--distributed_type fsdp: switchlora cannot divide the {layer.in_features} inputs "
                        f"of {name} evenly: use another number of devices, --replicas, or ddp"
                    ]
                )
        kind = VectorAdamW8bit if self.config.optimizer.optimizer == "adamw8bit" else VectorAdamW
        arguments = {**self.config.rule.arguments(), "weight_decay": self.config.optimizer.weight_decay}
        return kind(self.parameter_groups(model), **arguments)

    def own_settings(self, factor: str) -> dict[str, Any]:
        return {"vectors": _VECTORS[factor]}

    def acts_before_step(self, optimizer: VectorAdamW, step: int) -> bool:
        """In updates that switch, or in which vectors are frozen."""
        if self._layers is None:
            return True
        states = [layer.switching for layer in self._layers]
        return any(state.frozen_A.any() or state.frozen_B.any() for state in states) or any(
            self.count(layer, step, index) for index, layer in enumerate(self._layers)
        )

    def before_step(self, model: nn.Module, optimizer: VectorAdamW, step: int) -> None:
        """Switch, reset, freeze; with gradients that were computed before the switch, and clipped."""
        layers = switched_layers(model)
        switches = [self.plan(layer, step, index) for index, layer in enumerate(layers)]
        self.carry_out(layers, switches, optimizer)

    def draw_uniform(self, step: int, index: int) -> float:
        """Equal on all ranks, and the same after a resume."""
        generator = rng.generator(self.config.run.seed, "switch count", step, index)
        return float(torch.rand((), dtype=torch.float64, generator=generator))

    def requested_count(self, rank: int, step: int, index: int) -> int:
        """Slots of each factor that the schedule would switch, before the clamp."""
        t = self.own_time(step)
        return SwitchSchedule.of(self.config.method, self.own_total()).requested_count(
            t, rank, self.uniform(step, index)
        )

    def count(self, layer: SwitchedLinear, step: int, index: int) -> int:
        """Slots of each factor of a layer that this update switches."""
        state = layer.switching
        if state.candidates <= layer.rank:
            return 0
        requested = self.requested_count(layer.rank, step, index)
        return allowed_count(requested, layer.rank, state.frozen_count(), state.candidates)

    def plan(self, layer: SwitchedLinear, step: int, index: int) -> Switch:
        """What a layer exchanges in this update; moves the pointers to the slots that come next."""
        settings, state = self.config.method, layer.switching
        count = self.count(layer, step, index)
        if not count:
            return Switch()
        if not settings.discontinuous_switch:
            return state.next_in_ring(count, not settings.zero_init_B)
        generator = rng.generator(self.config.run.seed, "switched candidates", step, index)
        return state.next_at_random(count, not settings.zero_init_B, generator)

    def carry_out(self, layers: list[SwitchedLinear], switches: list[Switch], optimizer: VectorAdamW) -> None:
        """Exchange the vectors of all layers, reset the optimizer's state of their counterparts and freeze those."""
        settings = self.config.method
        due = [(layer, switch) for layer, switch in zip(layers, switches, strict=True) if switch]
        corrections = exchange(due, settings.switch_lora_drop, settings.cal_delta_norm)
        switched = sum(len(switch.slots_a) + len(switch.slots_b) for _, switch in due)
        optimizer.reported = {"switched_vectors": switched}
        if settings.cal_delta_norm:
            shards = [ShardInfo.of(layer.frozen_weight) for layer, _ in due]
            norm = whole_norm(zip(corrections, shards, strict=True))
            optimizer.reported = {**optimizer.reported, "switch_delta_norm": norm}
        for layer, switch in due:
            layer.switching.frozen_B[switch.slots_a] = settings.adam_warm_step
            layer.switching.frozen_A[switch.slots_b] = settings.adam_warm_step
        # Only this update's slots have the full count, or a negative one (reset without freezing).
        counterparts_b = [(layer.lora_B, switch.slots_a) for layer, switch in due]
        self._reset([*counterparts_b, *((layer.lora_A, switch.slots_b) for layer, switch in due)], optimizer)
        self._freeze(layers)

    def _reset(self, slots: list[tuple[Tensor, list[int]]], optimizer: VectorAdamW) -> None:
        """Zero moments and step counts of some vectors of each factor."""
        settings = self.config.method
        if not settings.remain_switch_state:
            chosen = [item for item in slots if item[1]]
            optimizer.reset_many(chosen, counts=not settings.remain_switch_step_state)

    def _freeze(self, layers: list[SwitchedLinear]) -> None:
        """Zero the gradients of frozen vectors and count their updates down."""
        frozen: list[Vectors] = []
        for layer in layers:
            for name, dim in _VECTORS.items():
                counters = layer.switching.frozen_A if name == "lora_A" else layer.switching.frozen_B
                if not counters.any():
                    continue
                if slots := (counters > 0).nonzero().flatten().tolist():
                    frozen.append(Vectors(local(getattr(layer, name).grad), dim, slots))
                counters.copy_((counters - 1).clamp_(min=0))
        if frozen:
            zero_vectors(frozen, frozen[0].tensor.device)


def switched_layers(model: nn.Module) -> list[SwitchedLinear]:
    return [layer for layer in low_rank_layers(model).values() if isinstance(layer, SwitchedLinear)]
