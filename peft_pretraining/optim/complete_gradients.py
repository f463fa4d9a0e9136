"""Gradients of per-layer updates that are complete, and move their parameters a lot at a time.

One after the other, every parameter would cost a dozen launches and a collective, and more time on a GPU than the
backward pass beside which it moves. What waits is small: R of projected weights, gradients of norms; what is larger
than a lot moves at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.process_group import as_it_is
from peft_pretraining.distributed.sharding import ShardInfo, each_norm, whole_norm
from peft_pretraining.optim.basis.subspace import Projected
from peft_pretraining.optim.low_rank import LowRankOptimizer
from peft_pretraining.optim.tensors.late_copy import LateCopy
from peft_pretraining.optim.tensors.mask import Mask

NUMBERS_AT_ONCE = 2**22
"""That wait at most before they move; the last one may bring more."""


@dataclass
class Complete:
    """A parameter's gradient of an update, all micro-batches in it."""

    param: Tensor
    group: dict[str, Any]
    gradient: Tensor
    """What the update rule is to see: R, or G where there is no projection."""
    projected: Projected | None = None
    """Whose R `gradient` is."""
    whole: Tensor | None = None
    """G of a projected weight, where somebody reads it."""
    averaged: bool = False
    """Over the ranks."""

    @property
    def numbers(self) -> int:
        return self.gradient.numel() + (0 if self.whole is None else self.whole.numel())

    def forget_zeros(self) -> None:
        """Let gradients of nothing but zeros take no memory."""
        if self.projected is None:
            self.gradient = self.gradient.new_zeros(()).expand(self.gradient.shape)
        if self.whole is not None:
            self.whole = self.whole.new_zeros(()).expand(self.whole.shape)


class CompleteGradients:
    """Averages, clips and uses up what is added, in lots. `clip`, `clip_full` and `reduce` are `PerLayerUpdates`'s."""

    def __init__(self, optimizer: LowRankOptimizer, reduce: Callable[[Tensor], Tensor], clip: float, clip_full: bool):
        self._optimizer, self._reduce, self._clip = optimizer, reduce, clip
        self._clip_full = clip_full and clip > 0
        self._lot: list[Complete] = []
        self._zero: list[Complete] = []
        """Those whose gradients were zeros, until one is not."""
        self.squared_norms: dict[Tensor, Tensor] = {}
        """Of the update's gradients that have moved, or stayed behind, before clipping."""
        self._moved = self._frozen = False
        self.late = False
        """Whether nothing is to be read back from the device, where that can be."""
        self._unsettled: list[tuple[Mask, LateCopy]] = []
        """Lots of this update of which nobody knows whether they have moved, and what will tell."""
        self._earlier: list[tuple[Mask, LateCopy]] = []
        """Those of updates before."""

    def begin(self, frozen: bool) -> None:
        """An update begins; what another one that broke off has left is dropped."""
        for each in (*self._lot, *self._zero):
            self.take_back(each.param)
        self._lot, self._zero = [], []
        self.squared_norms.clear()
        self._moved, self._frozen = False, frozen
        self._earlier += self._unsettled
        self._unsettled = []

    def __contains__(self, param: Tensor) -> bool:
        return param in self.squared_norms or any(each.param is param for each in self._lot)

    def add(self, complete: Complete) -> None:
        """Move a parameter together with others, or at once if there is enough."""
        self._lot.append(complete)
        if sum(each.numbers for each in self._lot) >= NUMBERS_AT_ONCE:
            self.move()

    def move(self) -> None:
        """Move what waits."""
        lot, self._lot = self._lot, []
        self._settle(self._earlier)  # counts of updates are about to be read
        self._average([each for each in lot if not each.averaged])
        for each in lot:
            each.gradient = each.gradient.to(self._optimizer.dtype_of(each.param))
            if each.projected is not None:
                each.projected.low_rank_grad = each.gradient
        for alike in _by_norm(lot):
            self._clip_and_update(alike)

    def _average(self, lot: list[Complete]) -> None:
        """Over the ranks: one collective for what is small."""
        if self._reduce is as_it_is:
            return
        small: dict[torch.dtype, list[Complete]] = {}
        for each in lot:
            if each.gradient.numel() < NUMBERS_AT_ONCE:
                small.setdefault(each.gradient.dtype, []).append(each)
            else:
                each.gradient = self._reduce(each.gradient)
        for together in small.values():
            flat = self._reduce(torch.cat([each.gradient.reshape(-1) for each in together]))
            parts = torch.split(flat, [each.gradient.numel() for each in together])
            for each, part in zip(together, parts, strict=True):
                each.gradient = part.view(each.gradient.shape)

    def _clip_and_update(self, lot: list[Complete]) -> None:
        measured = [self._measured(each) for each in lot]
        norms = limits = each_norm(measured)
        if self._clip_full:
            limits = each_norm([_of_whole(each) or part for each, part in zip(lot, measured, strict=True)])
        factors = list((self._clip / (limits + 1e-6)).clamp(max=1.0).unbind())
        if self.late and not self._frozen and all(self._masks(each) for each in lot):
            self._keep_norms(lot, norms)
            finite = norms.isfinite().all()
            self._scale(list(zip(lot, factors, strict=True)))
            self._update(lot, self._mask(finite))
            return
        moving: list[Complete] = []
        clipped: list[tuple[Complete, Tensor]] = []
        self._keep_norms(lot, norms)
        for each, part, value, factor in zip(lot, measured, norms.tolist(), factors, strict=True):
            if not math.isfinite(value):  # in float64 it overflows no more
                norm = whole_norm([(part[0].double(), part[1])])
                value = float(norm)
                self.squared_norms[each.param] = norm.square()
                if not self._clip_full or each.whole is None:
                    factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            if self._frozen or not math.isfinite(value):
                self.take_back(each.param)
            elif value == 0 and not self._moved and part[1].on_all_ranks(~each.gradient.any()):
                each.forget_zeros()
                self._zero.append(each)
            else:
                self._moved = True
                moving += [*self._zero, each]
                clipped.append((each, factor))
                self._zero.clear()
        self._scale(clipped)
        self._update(moving)

    def _keep_norms(self, lot: list[Complete], norms: Tensor) -> None:
        squares = norms.double().square().unbind()
        self.squared_norms.update(zip((each.param for each in lot), squares, strict=True))

    def _masks(self, each: Complete) -> bool:
        """Whether a parameter can move without a look at whether its gradient is finite."""
        changes = each.projected is not None and each.projected.changes_bases
        return not changes and self._optimizer.objects(each.param).masks

    def _mask(self, finite: Tensor) -> Mask:
        """What a lot moves by, which is settled once the host knows."""
        found_inf = finite.logical_not().float()
        mask = Mask(found_inf)
        self._unsettled.append((mask, LateCopy(found_inf)))
        self._moved = True
        return mask

    def settle(self) -> None:
        """Take back what was counted for lots that stayed as they are, of which the host hears here."""
        for lots in (self._earlier, self._unsettled):
            self._settle(lots)

    @staticmethod
    def _settle(lots: list[tuple[Mask, LateCopy]]) -> None:
        for mask, found_inf in lots:
            mask.settle(bool(found_inf.tolist()))
        lots.clear()

    def _update(self, lot: list[Complete], mask: Mask | None = None) -> None:
        read = [(each.param, self._read(each), each.group, each.projected) for each in lot]
        self._optimizer.update_together(read, mask)

    def _measured(self, each: Complete) -> tuple[Tensor, ShardInfo]:
        """What the norm is of: R, or G where the lift reads it."""
        if each.whole is not None and self._optimizer.objects(each.param).lift.reads_gradient:
            return each.whole, ShardInfo.of(each.param)
        return each.gradient, self._optimizer.shard_of(each.param)

    def _scale(self, clipped: list[tuple[Complete, Tensor]]) -> None:
        """Multiply gradients by a factor each."""
        if not self._clip:
            return
        scaled = list(clipped)
        for each, factor in clipped:
            if each.projected is None:
                continue
            if each.whole is not None and self._optimizer.objects(each.param).lift.reads_gradient:
                scaled.append((Complete(each.param, each.group, each.whole), factor))
            else:
                each.projected.scaled_by = factor
        if scaled:
            torch._foreach_mul_([each.gradient for each, _ in scaled], [factor for _, factor in scaled])

    @staticmethod
    def _read(each: Complete) -> Tensor | None:
        """G, for those that read it."""
        return each.gradient if each.projected is None else each.whole

    def take_back(self, param: Tensor) -> None:
        """The update does not take place: a first basis that is in place already goes, and stays due."""
        if subspace := self._optimizer.subspaces.get(param):
            subspace.clear_first(self._optimizer.local_state(param))


def _of_whole(each: Complete) -> tuple[Tensor, ShardInfo] | None:
    return None if each.whole is None else (each.whole, ShardInfo.of(each.param))


def _by_norm(lot: list[Complete]) -> Iterator[list[Complete]]:
    """Those whose norms have one dtype: in a wider one clipping would round differently."""
    kinds: dict[torch.dtype, list[Complete]] = {}
    for each in lot:
        kinds.setdefault(torch.promote_types(each.gradient.dtype, torch.float32), []).append(each)
    yield from kinds.values()
