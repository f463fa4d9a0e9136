"""Exchanging vectors between factors and candidate pools, for many layers at once, without changing their functions.

SwitchLoRA, arXiv 2406.06564. For a row a_i of A that makes room for the candidate p,

    W ← W + s · b_i (a_i - p)ᵀ

keeps W + s·B·A, and likewise for a column of B. The outgoing vectors are saved first and the incoming ones read after
that, so it holds for any choice of candidates, even the outgoing ones themselves.

Sharded over devices, A and the pools have their vectors' entries sharded, W and B their rows. Pools and factors are
then exchanged where they lie, and W needs the changed rows of A as a whole: those alone are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_pretraining.distributed.gathering import gather_columns
from peft_pretraining.distributed.sharding import ShardInfo, local
from peft_pretraining.nn import exchange_together as together
from peft_pretraining.nn.low_rank_linear import working_dtype
from peft_pretraining.nn.switching import Switch, SwitchedLinear, SwitchState
from peft_pretraining.optim.tensors.full_precision import full_float32_products
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.sending import send


@torch.no_grad()
@full_float32_products()
def exchange(
    switches: Sequence[tuple[SwitchedLinear, Switch]], drop: float = 0.0, corrections: bool = True
) -> list[Tensor]:
    """Carry out the switches; returns the correction (m, n), or this device's rows, that each layer's W got, if
    `corrections` are asked for.

    Vectors travel in one copy to the pools' memory and one back, whatever the number of layers, and in one gathering
    over the devices if they are sharded. `drop` takes that share of its old value off a vector that goes back to its
    pool, which then gets its old length.
    """
    if not switches:
        return []
    if launches_cost(local(switches[0][0].lora_A).device):
        return exchange_together(switches, drop, corrections)
    outgoing = []
    for layer, switch in switches:
        outgoing.append(local(layer.lora_A)[switch.slots_a])  # (k, n)
        outgoing.append(local(layer.lora_B)[:, switch.slots_b].T)  # (k, m)
    incoming = swap(switches, outgoing, drop)
    return _install(switches, outgoing, incoming, corrections)


def swap(switches: Sequence[tuple[SwitchedLinear, Switch]], outgoing: list[Tensor], drop: float) -> list[Tensor]:
    """Save the outgoing vectors in the pools and read the incoming ones, where the factors are: those of A (k, n) and
    of B (k, m) in turn, layer by layer."""
    device = outgoing[0].device
    pools_device = local(switches[0][0].switching.candidates_A).device
    for (layer, switch), (a, b) in zip(switches, _pairs(_moved(outgoing, pools_device)), strict=True):
        state = layer.switching
        _save(state.candidates_A, state.selected_A[switch.slots_a], a, drop, device)
        _save(state.candidates_B, state.selected_B[switch.slots_b], b, drop, device)
        _select(state, switch)
    waiting = []
    for layer, switch in switches:
        waiting.append(local(layer.switching.candidates_A)[switch.incoming_a])
        waiting.append(local(layer.switching.candidates_B)[switch.incoming_b])
    return _moved(waiting, device)


def swap_on_device(switches: Sequence[tuple[SwitchedLinear, Switch]], outgoing: list[Tensor]) -> list[Tensor]:
    """`swap` without `drop` for pools that are where the factors are: all rows at once."""
    places: list[Tensor] = []
    for layer, switch in switches:
        state = layer.switching
        for pool, selected in (
            (state.candidates_A, state.selected_A[switch.slots_a]),
            (state.candidates_B, state.selected_B[switch.slots_b]),
        ):
            places += [local(pool)[index] for index in selected.tolist()]
        _select(state, switch)
    rows = [row for part in outgoing for row in part.unbind()]
    torch._foreach_copy_(places, rows)
    found = []
    for layer, switch in switches:
        state = layer.switching
        for pool, indices in ((state.candidates_A, switch.incoming_a), (state.candidates_B, switch.incoming_b)):
            found += [local(pool)[index] for index in indices]
    flat = torch.cat(found).split([part.numel() for part in outgoing])
    return [piece.view(part.shape) for piece, part in zip(flat, outgoing, strict=True)]


def _select(state: SwitchState, switch: Switch) -> None:
    state.selected_A[switch.slots_a] = torch.tensor(switch.incoming_a, dtype=torch.int64)
    state.selected_B[switch.slots_b] = torch.tensor(switch.incoming_b, dtype=torch.int64)


def _install(
    switches: Sequence[tuple[SwitchedLinear, Switch]], outgoing: list[Tensor], incoming: list[Tensor], wanted: bool
) -> list[Tensor]:
    """Put the incoming vectors in, A first, and correct W by what they change, rounded once.

    Vectors are those of A and of B in turn, layer by layer. Returns the corrections if they are `wanted`.
    """
    high = working_dtype(switches[0][0].lora_A.dtype)
    rows = []
    for (layer, switch), a, old in zip(switches, incoming[0::2], outgoing[0::2], strict=True):
        rows.append(old.to(high) - a.to(high))  # (k, n)
        local(layer.lora_A)[switch.slots_a] = a
        rows.append(local(layer.lora_A)[switch.slots_b].to(high))  # (k, n)
    rows = gather_columns(rows, switches[0][0].lora_A)

    corrections = []
    for (layer, switch), (a_change, a_rows), b, old in zip(
        switches, _pairs(rows), incoming[1::2], outgoing[1::2], strict=True
    ):
        lora_b = local(layer.lora_B)
        correction = lora_b[:, switch.slots_a].to(high) @ a_change  # (m, k) @ (k, n)
        b_change = old.to(high) - b.to(high)  # (k, m)
        correction += b_change.T @ a_rows
        lora_b[:, switch.slots_b] = b.T
        correction *= layer.scale
        layer.add_to_weight(correction)
        if wanted:
            corrections.append(correction)
    return corrections


def _save(pool: Tensor, indices: Tensor, vectors: Tensor, drop: float, device: torch.device) -> None:
    """Write vectors (k, d) to their places in a pool (c, d). Devices that share it exchange numbers on `device`."""
    part = local(pool)
    if drop:
        changed, shard = vectors - drop * part[indices], ShardInfo.of(pool)
        lengths = torch.linalg.vector_norm(torch.stack([vectors, changed]).to(working_dtype(part.dtype)), dim=2)
        if shard.dim is not None:
            lengths = shard.sum(lengths.square().to(device)).sqrt().to(part.device)
        factor = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 0.0)  # (k,)
        vectors = (changed * factor[:, None]).to(part.dtype)
    part[indices] = vectors


def _moved(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """Matrices on another device, with a single copy."""
    if parts[0].device == device:
        return parts
    flat = send(torch.cat([part.flatten() for part in parts]), device)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


@torch.no_grad()
def exchange_together(
    switches: Sequence[tuple[SwitchedLinear, Switch]], drop: float, corrections: bool
) -> list[Tensor]:
    """`exchange` with operations on all layers of one shape."""
    lots = together.lots_of(switches)
    outgoing, stacks = together.outgoing_vectors(lots, len(switches))
    if not drop and local(switches[0][0].switching.candidates_A).device == outgoing[0].device:
        incoming = swap_on_device(switches, outgoing)
    else:
        incoming = swap(switches, outgoing, drop)
    return together.install(lots, stacks, outgoing, incoming, corrections)


def _pairs(parts: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Those of A and of B, layer by layer."""
    return list(zip(parts[0::2], parts[1::2], strict=True))
