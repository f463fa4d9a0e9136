"""The subspace of one weight: when its bases change, and its gradients in them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import local
from peft_pretraining.optim.bases import BasisRule, Refresh
from peft_pretraining.optim.projection import Bases, overlap
from peft_pretraining.optim.update_rules import UpdateRule

log = logging.getLogger("peft_pretraining")


@dataclass
class Projected:
    """A projected gradient waiting for its update, and what becomes of the bases with it."""

    low_rank_grad: Tensor
    new_bases: Bases | None = None
    """The bases it was projected with, if they are new."""
    energy: Tensor | None = None
    """‖R‖² / ‖G‖², at a refresh."""
    failed: bool = False
    """The refresh was due, but its decomposition failed."""
    scaled_by: Tensor | float = 1.0
    """By what `low_rank_grad` was multiplied since."""
    source: Tensor | None = None
    """The gradient it was made of, if somebody may change that before the update."""
    version: int = 0
    """Of the gradient at that time: torch counts the changes in place."""

    @property
    def changes_bases(self) -> bool:
        """Whether this update's refresh was made, or failed."""
        return self.new_bases is not None or self.failed

    def look_at(self, grad: Tensor) -> None:
        """Remember what this was made of."""
        self.source, self.version = grad, local(grad)._version

    def is_of(self, grad: Tensor) -> bool:
        """Whether it still belongs to this gradient: neither another one has come, nor was this one changed."""
        return self.source is None or (self.source is grad and self.version == local(grad)._version)

    def scale(self, factor: Tensor | float) -> None:
        """Multiply by a scalar."""
        self.low_rank_grad.mul_(factor)
        self.scaled_by = self.scaled_by * factor


class Subspace:
    """Projects the gradients G (m, n) of one weight, and refreshes the bases.

    Its tensors are in the weight's optimizer state, which every method gets: the bases, `last_refresh` (update step, -1
    before the first) and `refreshes` (their number). `group` holds the settings, `step` is the 0-based update.
    `peers` lists the subspaces of one optimizer; a staggered refresh depends on the place among them. `note` explains a
    name that the caller has not given.
    """

    def __init__(self, rule: BasisRule, name: str, peers: list[Subspace], note: str = ""):
        self.rule, self.name, self._note = rule, name, note
        self._peers, self._place = peers, len(peers)
        self._observed: tuple[Tensor | int, int] = (0, 0)  # sum and number of gradients
        peers.append(self)

    def init_state(self, state: dict[str, Any], param: Tensor) -> None:
        state |= {"last_refresh": counter(-1), "refreshes": counter(0)}
        self.rule.projection.init_state(state, param)
        self.rule.init_state(state, param)

    def bases(self, state: dict[str, Any]) -> Bases:
        return self.rule.projection.bases(state)

    def refresh_is_due(self, state: dict[str, Any], group: dict[str, Any], step: int) -> bool:
        """At update 0, at every multiple of the gap (plus the weight's place in it when staggered), and, where a
        refresh could not be made, at the next update at which it can."""
        last, gap = int(state["last_refresh"]), group["update_proj_gap"]
        if last < 0:
            return True
        if gap == 0 or not self.rule.refreshes:
            return False
        offset = self._place * gap // len(self._peers) if group["stagger_refresh"] else 0
        return (step - offset) // gap > (last - offset) // gap

    def refresh_reads_gradient(self, state: dict[str, Any], group: dict[str, Any], step: int) -> bool:
        """Whether this update takes a basis from the gradient: random ones it does not."""
        return self.refresh_is_due(state, group, step) and self.rule.reads_gradient(step)

    def observe(self, grad: Tensor) -> None:
        """Let the refresh of this update see `grad`, too."""
        total, count = self._observed
        self._observed = total + grad.to(torch.promote_types(grad.dtype, torch.float32)), count + 1

    def forget_observed(self) -> None:
        self._observed = (0, 0)

    def project(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], step: int) -> Projected:
        """R of a gradient in the basis that its update uses, a new one where a refresh is due. Nothing is committed.

        A gradient with a NaN or an infinity never reaches the SVD, which would not return: it is projected with the old
        basis, stays non-finite, and its refresh stays due. So it does with a gradient of zeros (a layer below one that
        starts at zero, an expert without tokens), which has no subspace. A random basis needs no look at the gradient,
        and must not depend on one: with per-layer updates each rank sees its own.
        """
        if not self.refresh_is_due(state, group, step):
            return Projected(self.down(state, grad))
        total, count = self._observed
        seen = (total + grad) / (count + 1) if count else grad
        shard = self.rule.projection.shard
        if self.rule.reads_gradient(step):
            if not shard.on_all_ranks(seen.isfinite().all()) or shard.on_all_ranks(~seen.any()):
                return Projected(self.down(state, grad))
        projected = Projected(grad, self._refreshed(state, seen, group, step))
        projected.low_rank_grad = self.down(state, grad, projected)
        projected.failed = projected.new_bases is None
        # In float64: the squares of a small float32 gradient underflow.
        norms = (torch.linalg.vector_norm(part, dtype=torch.float64) for part in (projected.low_rank_grad, grad))
        kept, whole = (norm.square() for norm in norms)
        if shard.dim is not None:
            kept, whole = self.rule.projection.low_rank_shard.sum(kept), shard.sum(whole)
        projected.energy = torch.where(whole > 0, kept / whole, 1.0)
        return projected

    def down(self, state: dict[str, Any], grad: Tensor, projected: Projected | None = None) -> Tensor:
        """R of a gradient, in the bases in use or in the new ones that come with `projected`."""
        bases = (projected and projected.new_bases) or self.bases(state)
        return self.rule.projection.down(bases, grad.to(next(iter(bases.values())).dtype))

    def _refreshed(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], step: int) -> Bases | None:
        """New bases in the weight's dtype; None, with a warning, if no routine could decompose the gradient."""
        old = self.bases(state)
        try:
            new = self.rule.refreshed(old, grad, Refresh(step, int(state["refreshes"]), group["seed"], self.name))
        except torch.linalg.LinAlgError as error:
            log.warning("the basis of %s could not be refreshed at update %d: %s%s", self.name, step, error, self._note)
            return None
        return {side: basis.to(old[side].dtype).contiguous() for side, basis in new.items()}

    def commit(
        self, state: dict[str, Any], projected: Projected, step: int, rule: UpdateRule, metrics: dict[str, list[Tensor]]
    ) -> None:
        """Store new bases, with the first moment of `rule` carried into them where the basis rule says so."""
        first = not int(state["refreshes"])
        if projected.failed:
            metrics.setdefault("failed_refreshes", []).append(torch.ones(()))
            if not first:  # with a basis to go on with, the next attempt is a gap away
                state["last_refresh"].fill_(step)
        if projected.new_bases is None:
            return
        old, new = self.bases(state), projected.new_bases
        metrics.setdefault("refreshed", []).append(torch.ones(()))
        if projected.energy is not None:
            metrics.setdefault("captured_energy", []).append(projected.energy)
        if not first:
            metrics.setdefault("basis_overlap", []).append(overlap(old, new))
            if self.rule.carries_momentum:
                projection = self.rule.projection
                rule.rotate(state, lambda moment: projection.carry_over(moment, old, new), projection.low_rank_shard)
        for side, basis in new.items():
            old[side].copy_(basis)
        state["refreshes"] += 1
        state["last_refresh"].fill_(step)


def counter(value: int) -> Tensor:
    """A number in the optimizer's state: int64, on the CPU."""
    return torch.full((), value, dtype=torch.int64)
