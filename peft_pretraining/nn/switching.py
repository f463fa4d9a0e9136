"""SwitchLoRA's candidate pools, and which vectors are live in a layer's factors (arXiv 2406.06564).

A layer (m, n) of rank r has c = min(m, n) candidates for the rows of A and c for the columns of B. Slot i of a factor
holds the candidate `selected[i]`, whose row in the pool is stale until the vector is switched out again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import ShardInfo, distribute_like, local
from peft_pretraining.nn.initialization import fill_uniform, kaiming_bound, switchlora_bounds
from peft_pretraining.nn.low_rank_linear import LowRankLinear


@dataclass(frozen=True)
class Switch:
    """What one layer exchanges in one update: for each slot, the pool index that comes in."""

    slots_a: list[int] = field(default_factory=list)
    incoming_a: list[int] = field(default_factory=list)
    slots_b: list[int] = field(default_factory=list)
    incoming_b: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.slots_a or self.slots_b)


class SwitchState(nn.Module):
    """Pools, selected indices, ring pointers and freeze counters of one layer, the only copy of each.

    They are part of the state dict, but neither parameters nor buffers: the integers are read by the host in every
    update and the pools, larger than W itself, stay in host memory by default (pinned for a CUDA device), so neither
    `.to()` nor DistributedDataParallel may touch them.

    candidates_A (c, n), candidates_B (c, m), selected_A/B (r), pointers (2): the slots of A and B that are switched
    next; frozen_A/B (r): updates for which a slot still gets no gradient. Where the model is sharded over devices, so
    are the vectors of the pools (`follow_sharding`); all else is the same on all ranks.
    """

    candidates_A: Tensor
    candidates_B: Tensor
    selected_A: Tensor
    selected_B: Tensor
    pointers: Tensor
    frozen_A: Tensor
    frozen_B: Tensor
    NAMES = ("candidates_A", "candidates_B", "selected_A", "selected_B", "pointers", "frozen_A", "frozen_B")

    def __init__(self, layer: LowRankLinear, offload: bool = True):
        super().__init__()
        m, n, rank = layer.out_features, layer.in_features, layer.rank
        self.candidates, self._offload = min(m, n), offload
        self.candidates_A = _pool((self.candidates, n), layer.lora_A, offload)
        self.candidates_B = _pool((self.candidates, m), layer.lora_B, offload)
        for name in ("selected_A", "selected_B", "frozen_A", "frozen_B"):
            setattr(self, name, torch.zeros(rank, dtype=torch.int64))
        self.pointers = torch.tensor([0, rank // 2])

    @torch.no_grad()
    def fill(self, layer: LowRankLinear, kind: str, generator: torch.Generator, zero_b: bool, shuffled: bool) -> None:
        """Draw the pools and say which candidates are live first: the last r, B's half a rank round, or random ones."""
        c, n = self.candidates_A.shape
        m, rank = layer.out_features, layer.rank
        bound_a, bound_b = (kaiming_bound(n), 0.0) if kind == "origin_lora" else switchlora_bounds(m, n, rank)
        fill_uniform(self.candidates_A, bound_a, generator)
        fill_uniform(self.candidates_B, 0.0 if zero_b else bound_b, generator)
        first_a = first_b = torch.arange(c - rank, c)
        if shuffled:
            first_a, first_b = (torch.randperm(c, generator=generator)[:rank] for _ in range(2))
        self.selected_A.copy_(first_a)
        self.selected_B.copy_(first_b.roll(rank // 2))

    @torch.no_grad()
    def follow_sharding(self, layer: LowRankLinear) -> None:
        """Keep of every candidate the entries that this device has of the layer's factors, which have been sharded."""
        for name, factor, dim in (("candidates_A", layer.lora_A, 1), ("candidates_B", layer.lora_B, 0)):
            shard = ShardInfo.of(factor)
            whole = getattr(self, name)
            # Not sharded at all, or with whole vectors dealt out, which the method refuses; or done already.
            if shard.dim != dim or ShardInfo.of(whole).dim is not None:
                continue
            part = _pool((len(whole), shard.size), local(factor), self._offload)
            part.copy_(shard.part(whole, 1))
            setattr(self, name, distribute_like(part, factor, 1, whole.shape[1]))

    def live_factors(self) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r) as the pools have them."""
        return self.candidates_A[self.selected_A], self.candidates_B[self.selected_B].T

    def frozen_count(self) -> int:
        """Slots that are frozen now, in the factor that has more of them."""
        return max(int((self.frozen_A > 0).sum()), int((self.frozen_B > 0).sum()))

    def next_in_ring(self, count: int, switch_b: bool) -> Switch:
        """The `count` slots that the pointers are at, and the candidates that follow in the ring; moves the pointers.

        The live vectors are always r neighbours in the ring, and A and B are half a rank apart in slots.
        """
        rank, chosen = len(self.selected_A), []
        for selected, pointer in ((self.selected_A, self.pointers[0]), (self.selected_B, self.pointers[1])):
            newest = int(selected[(int(pointer) - 1) % rank])
            slots = [(int(pointer) + i) % rank for i in range(count)]
            chosen.append((slots, [(newest + 1 + i) % self.candidates for i in range(count)]))
        self.pointers.add_(count).remainder_(rank)
        return Switch(*chosen[0], *(chosen[1] if switch_b else ([], [])))

    def next_at_random(self, count: int, switch_b: bool, generator: torch.Generator) -> Switch:
        """As `next_in_ring`, with incoming candidates drawn from those that are not live."""
        chosen = self.next_in_ring(count, switch_b)
        incoming = []
        for selected in (self.selected_A, self.selected_B):
            waiting = torch.ones(self.candidates, dtype=torch.bool).index_fill_(0, selected, False).nonzero().flatten()
            picked = torch.randperm(len(waiting), generator=generator)[:count]
            incoming.append(waiting[picked].tolist())
        return Switch(chosen.slots_a, incoming[0], chosen.slots_b, incoming[1] if switch_b else [])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.NAMES:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        given = {name: state_dict[prefix + name] for name in self.NAMES if prefix + name in state_dict}
        missing += [prefix + name for name in self.NAMES if name not in given]
        for name, tensor in given.items():
            if getattr(self, name).shape != tensor.shape:
                errors.append(f"{prefix}{name} has shape {tuple(tensor.shape)}, not {tuple(getattr(self, name).shape)}")
            else:
                getattr(self, name).copy_(tensor)


def _pool(shape: tuple[int, int], factor: Tensor, offload: bool) -> Tensor:
    if not offload:
        return torch.zeros(shape, dtype=factor.dtype, device=factor.device)
    return torch.zeros(shape, dtype=factor.dtype, pin_memory=factor.device.type == "cuda")


class SwitchedLinear(LowRankLinear):
    """A layer with factors and candidates for them."""

    switching: SwitchState

    def add_candidates(self, state: SwitchState) -> None:
        """Take the first factors from the pools; W takes back what they add, so the function stays."""
        self.switching = state
        self.set_factors(*state.live_factors(), keep_function=True)

    def follow_sharding(self) -> None:
        super().follow_sharding()
        self.switching.follow_sharding(self)
