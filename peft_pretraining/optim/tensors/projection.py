"""The algebra of low-rank projections: which sides a weight is projected from, down to R and back.

A weight W (m, n) is projected from the left by a basis P (m, r), R = Pᵀ G (r, n), from the right by Q (r, n),
R = G Qᵀ (m, r), or from both, R = Pᵀ G Qᵀ (r, r). Source: GaLore, arXiv 2403.03507, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import HALF, WHOLE, ShardInfo
from peft_pretraining.optim.tensors.int8_blocks import dequantize, quantize_vectors
from peft_pretraining.optim.tensors.rounding import rows_at_once

LEFT, RIGHT = "left_basis", "right_basis"
"""Keys of P (m, r) and Q (r, n) in a parameter's optimizer state."""

SCALES = "_scales"
"""What is added to these for the scales of bases in 8 bits."""

Bases = dict[str, Tensor]


class _BasesAsRead(Bases):
    """Bases that were rounded to 8 bits, with what they were read from: read in bfloat16, they would not round to the
    same numbers again."""

    kept: dict[str, Tensor]


SIDES = ("std", "reverse_std", "left", "right", "full")


def projected_sides(side: str, shape: torch.Size) -> tuple[str, ...]:
    """Which bases a weight of this shape has. Decided once from the weight's shape, never from that of R.

    `std` (arXiv 2403.03507, section 4.2) has its basis on the shorter side, so that R is long and thin: right if
    m >= n.
    """
    tall = shape[0] >= shape[1]
    return {
        "std": (RIGHT,) if tall else (LEFT,),
        "reverse_std": (LEFT,) if tall else (RIGHT,),
        "left": (LEFT,),
        "right": (RIGHT,),
        "full": (LEFT, RIGHT),
    }[side]


def _along(side: str) -> int:
    """The dimension of a basis that its vectors lie along."""
    return 0 if side == LEFT else 1


@dataclass(frozen=True)
class Projection:
    """To low-rank coordinates and back. Without sides it is the identity: an unprojected parameter.

    G and W are this device's part of a weight that may be divided over several (`shard`); bases are whole. Divided
    along the side that is not projected, nothing needs to be communicated: R is divided in the same way. Divided along
    a projected side, R is a sum over the devices, and the same on all of them.
    """

    sides: tuple[str, ...] = ()
    rank: int = 0
    shard: ShardInfo = WHOLE
    stored: torch.dtype | None = None
    """How bases are kept; int8 is in blocks with scales. None: as they are read."""
    working: torch.dtype | None = None
    """How they are read. None: as they are kept."""

    @classmethod
    def for_weight(cls, side: str, rank: int, shape: torch.Size | ShardInfo) -> Projection:
        """The projection of a weight (m, n), or of one that is divided; a rank beyond min(m, n) becomes min(m, n)."""
        shard = shape if isinstance(shape, ShardInfo) else ShardInfo(shape)
        return cls(projected_sides(side, shard.shape), min(rank, *shard.shape), shard)

    def new_bases(self, weight: Tensor) -> Bases:
        """Zero bases in the weight's dtype, to be filled by the first refresh. They are whole on every device."""
        m, n = self.shard.shape
        bases: Bases = {}
        if LEFT in self.sides:
            bases[LEFT] = weight.new_zeros(m, self.rank)
        if RIGHT in self.sides:
            bases[RIGHT] = weight.new_zeros(self.rank, n)
        return bases

    def stored_bases(self, bases: Bases) -> dict[str, Tensor]:
        """Bases as they are kept, and the scales of those in 8 bits, by key of the state."""
        kept: dict[str, Tensor] = {}
        for side, basis in bases.items():
            if self.stored == torch.int8:
                kept[side], kept[side + SCALES] = quantize_vectors(basis, _along(side))
            else:
                kept[side] = basis.to(self.stored or basis.dtype).contiguous()
        return kept

    def kept_in(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state's tensors that bases are read from."""
        return {key: state[key] for side in self.sides for key in (side, side + SCALES) if key in state}

    def bases(self, state: Mapping[str, Tensor]) -> Bases:
        """The bases in the dtype that the arithmetic is done in: the stored ones themselves where they have that."""
        return {side: self._read(state[side], state.get(side + SCALES), side) for side in self.sides}

    def _read(self, basis: Tensor, scales: Tensor | None, side: str) -> Tensor:
        if scales is not None and basis.dtype == torch.int8:
            return dequantize(basis, scales, _along(side), self.working or torch.float32)
        return basis if self.working is None else basis.to(self.working)

    def as_read(self, bases: Bases) -> Bases:
        """Bases with what storing takes from them: those that later updates will read."""
        kept = self.stored_bases(bases)
        read = _BasesAsRead({side: self._read(kept[side], kept.get(side + SCALES), side) for side in bases})
        if self.stored == torch.int8:
            read.kept = kept
        return read

    def as_stored(self, bases: Bases) -> dict[str, Tensor]:
        """What `as_read` has read bases from, or `stored_bases` of others."""
        return getattr(bases, "kept", None) or self.stored_bases(bases)

    def store(self, state: Mapping[str, Tensor], bases: Bases) -> None:
        """Put bases into the state's tensors."""
        for key, kept in self.as_stored(bases).items():
            if kept is not state[key]:
                state[key].copy_(kept)

    def low_rank_shape(self, shape: torch.Size) -> torch.Size:
        """Of R, for a weight, or a part of one, of `shape`."""
        if not self.sides:
            return shape
        m, n = shape
        return torch.Size((self.rank if LEFT in self.sides else m, self.rank if RIGHT in self.sides else n))

    @property
    def shards_projected_side(self) -> bool:
        """Whether devices hold different parts of a dimension that is projected away."""
        return self.shard.dim is not None and (LEFT, RIGHT)[self.shard.dim] in self.sides

    @property
    def sum_shard(self) -> ShardInfo:
        """The devices over which `project` has to be summed up: none where the projected side is not divided."""
        return self.shard if self.shards_projected_side else WHOLE

    @property
    def keeps_orthonormal(self) -> bool:
        """Whether orthonormal bases are so when they are read, up to the rounding of float32."""
        return self.stored is None or (self.stored.is_floating_point and self.stored not in HALF)

    @property
    def low_rank_shard(self) -> ShardInfo:
        """How R is divided."""
        shape, along = self.low_rank_shape(self.shard.shape), 1 if self.sides == (LEFT,) else 0
        if self.shards_projected_side or self.shard.dim is None:
            return ShardInfo(shape, along=along)
        return replace(self.shard, shape=shape, along=along)

    def _local(self, bases: Bases) -> Bases:
        """The parts of the bases that meet this device's part of the weight."""
        if not self.shards_projected_side:
            return bases
        assert self.shard.dim is not None
        side = (LEFT, RIGHT)[self.shard.dim]
        return {**bases, side: self.shard.part(bases[side], self.shard.dim)}

    def project(self, bases: Bases, grad: Tensor) -> Tensor:
        """Projects: G (m, n) -> the shape of R, this device's share of a sum over `sum_shard`. A G in fewer digits than
        the bases is widened some rows at a time."""
        bases = self._local(bases)
        wide = next((basis.dtype for basis in bases.values()), grad.dtype)
        if grad.dtype == wide or wide in HALF:
            return self._projected(bases, grad.to(wide))
        at_once = rows_at_once(grad)
        parts: list[Tensor] = []
        for start in range(0, max(len(grad), 1), at_once):
            rows = slice(start, start + at_once)
            of_rows = {**bases, LEFT: bases[LEFT][rows]} if LEFT in bases else bases
            part = self._projected(of_rows, grad[rows].to(wide))
            if LEFT in bases and parts:
                parts[0] += part
            else:
                parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def _projected(bases: Bases, grad: Tensor) -> Tensor:
        if LEFT in bases:
            grad = bases[LEFT].T @ grad
        if RIGHT in bases:
            grad = grad @ bases[RIGHT].T
        return grad

    def _rows(self, bases: Bases, update: Tensor, rows: slice | None) -> tuple[Bases, Tensor]:
        """What these rows of this device's part of the weight are made of."""
        bases = self._local(bases)
        if rows is None:
            return bases, update
        if LEFT in bases:
            return {**bases, LEFT: bases[LEFT][rows]}, update
        return bases, update[rows]

    def project_back(self, bases: Bases, update: Tensor, rows: slice | None = None) -> Tensor:
        """Projects back: the shape of R -> this device's part of (m, n), or these rows of it."""
        bases, update = self._rows(bases, update, rows)
        if LEFT in bases:
            update = bases[LEFT] @ update
        return update @ bases[RIGHT] if RIGHT in bases else update

    def add_projected_back(
        self, param: Tensor, bases: Bases, update: Tensor, factor: float, rows: slice | None = None
    ) -> None:
        """param += factor * (update projected back), without forming the full-size update unless dtypes differ. `param`
        may be some `rows` of the weight."""
        if update.dtype != param.dtype:  # a weight that is widened, or that was converted since
            param.add_(self.project_back(bases, update, rows), alpha=factor)
            return
        bases, update = self._rows(bases, update, rows)
        if RIGHT in bases:
            update = bases[LEFT] @ update if LEFT in bases else update
            param.addmm_(update, bases[RIGHT], alpha=factor)
        elif LEFT in bases:
            param.addmm_(bases[LEFT], update, alpha=factor)
        else:
            param.add_(update, alpha=factor)

    def rotate_momentum(self, moment: Tensor, old: Bases, new: Bases) -> Tensor:
        """A moment in the old bases' coordinates, projected into the new ones (GoLore, arXiv 2410.11289).

        Left: P_newᵀ (P_old M); right: (M Q_old) Q_newᵀ. In float32 at least, in the shape and dtype of `moment`.
        """
        wide = torch.promote_types(moment.dtype, torch.float32)
        carried = moment.to(wide)
        if LEFT in old:
            carried = (new[LEFT].to(wide).T @ old[LEFT].to(wide)) @ carried  # (r, r) @ (r, ...)
        if RIGHT in old:
            carried = carried @ (old[RIGHT].to(wide) @ new[RIGHT].to(wide).T)  # (..., r) @ (r, r)
        return carried.to(moment.dtype)


def overlap(old: Bases, new: Bases) -> Tensor:
    """‖P_newᵀ P_old‖² / r, averaged over the sides: 1 for the same subspace, r/m on average for unrelated ones."""
    shares = []
    for side, basis in new.items():
        inner = basis.T @ old[side] if side == LEFT else basis @ old[side].T  # (r, r)
        shares.append(inner.float().square().sum() / inner.shape[0])
    return torch.stack(shares).mean()
