"""`exchange` for layers on a device where every operation is a launch: those of one shape at once.

The formulas are those of nn/exchange.py. Layers may exchange different numbers of vectors: where there are fewer than
the most, changes of zero fill up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_pretraining.distributed.gathering import gather_columns
from peft_pretraining.distributed.sharding import local
from peft_pretraining.nn import weight_rest
from peft_pretraining.nn.low_rank_linear import LowRankLinear, working_dtype
from peft_pretraining.nn.switching import Switch, SwitchedLinear
from peft_pretraining.optim.tensors.sending import send

NUMBERS_AT_ONCE = 2**27
"""Of frozen weights that are corrected together: a correction is 512 MB in float32."""


@dataclass
class Lot:
    """Layers of one shape. `places`: of each of them among all that exchange vectors."""

    places: list[int]
    layers: list[SwitchedLinear]
    switches: list[Switch]
    index: dict[str, Tensor] = field(default_factory=dict)

    @property
    def most(self) -> tuple[int, int]:
        """The largest numbers of vectors of A and of B that a layer exchanges."""
        return max(len(each.slots_a) for each in self.switches), max(len(each.slots_b) for each in self.switches)

    @property
    def factors_b(self) -> list[Tensor]:
        return [local(layer.lora_B) for layer in self.layers]

    def rows_a(self, padded: bool) -> list[Tensor]:
        """Views of the rows of A that go out; with `padded`, of those beside the columns of B that do, as many for
        every layer."""
        if not padded:
            return [
                local(a.lora_A)[i] for a, each in zip(self.layers, self.switches, strict=True) for i in each.slots_a
            ]
        slots = _padded([each.slots_b for each in self.switches], self.most[1])
        return [local(a.lora_A)[i] for a, own in zip(self.layers, slots, strict=True) for i in own]

    def indices(self) -> dict[str, list[int]]:
        """Which layer, which place in it, which slot: of the vectors of A and B; and A's slots, filled up."""
        found: dict[str, list[int]] = {name: [] for name in ("layer_a", "place_a", "layer_b", "place_b", "slot_b")}
        for number, each in enumerate(self.switches):
            for name, slots in (("a", each.slots_a), ("b", each.slots_b)):
                found[f"layer_{name}"] += [number] * len(slots)
                found[f"place_{name}"] += range(len(slots))
            found["slot_b"] += each.slots_b
        filled = _padded([each.slots_a for each in self.switches], self.most[0])
        found["layer"] = [number for number, slots in enumerate(filled) for _ in slots]
        found["slot"] = [slot for slots in filled for slot in slots]
        return found


def _padded(lists: Sequence[list[int]], length: int) -> list[list[int]]:
    return [[*each, *[0] * (length - len(each))] for each in lists]


def lots_of(switches: Sequence[tuple[SwitchedLinear, Switch]]) -> list[Lot]:
    """The layers by shape, some at a time, with all their indices on the device by a single copy."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for place, (layer, _) in enumerate(switches):
        a, b = local(layer.lora_A), local(layer.lora_B)
        kinds.setdefault((a.shape, b.shape, layer.scale, layer.rest is None), []).append(place)
    lots = []
    for places in kinds.values():
        layer = switches[places[0]][0]
        at_once = max(1, NUMBERS_AT_ONCE // max(1, local(layer.frozen_weight).numel()))
        for start in range(0, len(places), at_once):
            own = places[start : start + at_once]
            lots.append(Lot(own, [switches[place][0] for place in own], [switches[place][1] for place in own]))
    lists = [lot.indices() for lot in lots]
    flat = torch.tensor([i for each in lists for indices in each.values() for i in indices], dtype=torch.int64)
    sizes = [len(indices) for each in lists for indices in each.values()]
    parts: Iterator[Tensor] = iter(torch.split(send(flat, local(switches[0][0].lora_A).device), sizes))
    for lot, each in zip(lots, lists, strict=True):
        lot.index = {name: next(parts) for name in each}
    return lots


def outgoing_vectors(lots: Sequence[Lot], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Those of A (k, n) and of B (k, m) in turn, for each of `count` layers; and of each lot all of B (L, m, r)."""
    found: list[Tensor] = [torch.empty(0)] * (2 * count)
    stacks = []
    for lot in lots:
        stack = torch.stack(lot.factors_b)
        stacks.append(stack)
        a_rows, like = lot.rows_a(padded=False), local(lot.layers[0].lora_A)
        a = torch.stack(a_rows) if a_rows else like.new_empty(0, like.shape[1])
        b = stack[lot.index["layer_b"], :, lot.index["slot_b"]]  # (K, m)
        for place, each_a, each_b in zip(lot.places, *by_layer(lot, a, b), strict=True):
            found[2 * place], found[2 * place + 1] = each_a, each_b
    return found, stacks


def by_layer(lot: Lot, a: Tensor, b: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The vectors of each layer."""
    return (
        torch.split(a, [len(each.slots_a) for each in lot.switches]),
        torch.split(b, [len(each.slots_b) for each in lot.switches]),
    )


def joined(lot: Lot, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The vectors of A and of B of all layers of a lot, from those of all layers."""
    return (
        torch.cat([vectors[2 * place] for place in lot.places]),
        torch.cat([vectors[2 * place + 1] for place in lot.places]),
    )


def install(
    lots: Sequence[Lot], stacks: Sequence[Tensor], outgoing: list[Tensor], incoming: list[Tensor], wanted: bool
) -> list[Tensor]:
    """Put the incoming vectors in, A first, and correct W by what they change, rounded once."""
    high = working_dtype(lots[0].layers[0].lora_A.dtype)
    rows = []
    for lot in lots:
        (a, _), (old, _) = joined(lot, incoming), joined(lot, outgoing)
        if len(a):
            torch._foreach_copy_(lot.rows_a(padded=False), list(a.unbind()))
        change = _filled(lot, "a", old.to(high) - a.to(high))  # (L, k, n)
        rows.append(change.flatten(0, 1))
        beside = lot.rows_a(padded=True)
        rows.append(torch.stack(beside).to(high) if beside else rows[-1][:0])  # (L * k, n)
    rows = gather_columns(rows, lots[0].layers[0].lora_A)

    found: dict[int, Tensor] = {}
    for lot, stack, change, beside_b in zip(lots, stacks, rows[0::2], rows[1::2], strict=True):
        (_, b), (_, old) = joined(lot, incoming), joined(lot, outgoing)
        count, index = len(lot.layers), lot.index
        beside_a = stack[index["layer"], :, index["slot"]].to(high).view(count, lot.most[0], -1)  # (L, k, m)
        left = torch.cat([beside_a, _filled(lot, "b", old.to(high) - b.to(high))], 1)  # (L, k, m)
        right = torch.cat([change.view(count, lot.most[0], -1), beside_b.view(count, lot.most[1], -1)], 1)
        correction = torch.bmm(left.mT, right).mul_(lot.layers[0].scale)  # (L, m, n)
        stack[index["layer_b"], :, index["slot_b"]] = b
        torch._foreach_copy_(lot.factors_b, list(stack.unbind()))
        add_to_weights(lot.layers, correction)
        if wanted:
            found |= dict(zip(lot.places, correction.unbind(), strict=True))
    return [found[place] for place in sorted(found)]


def _filled(lot: Lot, factor: str, vectors: Tensor) -> Tensor:
    """Vectors (K, d) of all layers as (L, k, d), with zeros where a layer has fewer than k."""
    filled = vectors.new_zeros(len(lot.layers), lot.most[factor == "b"], vectors.shape[1])
    filled[lot.index[f"layer_{factor}"], lot.index[f"place_{factor}"]] = vectors
    return filled


def add_to_weights(layers: Sequence[LowRankLinear], corrections: Tensor) -> None:
    """`add_to_weight` for layers of one shape: corrections (L, m, n), or this device's parts."""
    weights = [local(layer.frozen_weight) for layer in layers]
    rests = [local(layer.rest) for layer in layers if layer.rest is not None]
    if rests:
        weight, rest = torch.stack(weights), torch.stack(rests)
        weight_rest.split(weight_rest.join(weight, rest).add_(corrections), weight, rest)
        torch._foreach_copy_(weights, list(weight.unbind()))
        torch._foreach_copy_(rests, list(rest.unbind()))
    elif weights[0].dtype == corrections.dtype:
        torch._foreach_add_(weights, list(corrections.unbind()))
    else:
        for layer, correction in zip(layers, corrections.unbind(), strict=True):
            layer.add_to_weight(correction)
