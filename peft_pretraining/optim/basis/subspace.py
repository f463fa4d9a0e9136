"""The subspace of one weight: when its bases change, and its gradients in them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import local
from peft_pretraining.optim.basis.basis_rule import BasisRule, Refresh
from peft_pretraining.optim.basis.svd import LinAlgError, flags_of, squared_norm
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.collectives import Collective, Phases, phases, run, together
from peft_pretraining.optim.tensors.full_precision import full_float32_products
from peft_pretraining.optim.tensors.projection import SCALES, Bases, Projection, overlap
from peft_pretraining.optim.tensors.state_tensor import StateTensor, counter

log = logging.getLogger("peft_pretraining")


@dataclass
class Projected:
    """A projected gradient waiting for its update, and what becomes of the bases with it."""

    low_rank_grad: Tensor
    new_bases: Bases | None = None
    """The bases it was projected with, if they are new."""
    in_place: bool = False
    """They are new, and in the state already."""
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
        return self.new_bases is not None or self.in_place or self.failed

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
    """Projects the gradients G (m, n) of one weight, and knows when its bases are refreshed.

    Its tensors are in the weight's optimizer state, which every method gets: the bases, `last_refresh` (update step, -1
    before the first) and `refreshes` (their number). `group` holds the settings, `step` is the 0-based update.
    `peers` lists the subspaces of one optimizer; a staggered refresh depends on the place among them. `note` explains a
    name that the caller has not given.
    """

    def __init__(self, rule: BasisRule, projection: Projection, name: str, peers: list[Subspace], note: str = ""):
        self.rule, self.projection, self.name, self.note = rule, projection, name, note
        self._peers, self._place = peers, len(peers)
        self._observed: tuple[Tensor | int, int] = (0, 0)  # sum and number of gradients
        peers.append(self)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two subspaces share whose states are interchangeable."""
        return (*self.rule.kind, self.projection.sides)

    def declare_state(self, weight: Tensor, group: dict[str, Any]) -> dict[str, StateTensor]:
        """Counters, bases, and what the basis rule has of its own, for a weight (its device's part)."""
        bases = self.projection.new_bases(weight)
        return {
            "last_refresh": StateTensor(counter(-1)),
            "refreshes": StateTensor(counter(0)),
            **{key: StateTensor(kept) for key, kept in self.projection.stored_bases(bases).items()},
            **self.rule.declare_state(bases, self.projection, group),
        }

    def bases(self, state: dict[str, Tensor]) -> Bases:
        return self.projection.bases(state)

    def refresh_is_due(self, state: dict[str, Tensor], group: dict[str, Any], step: int) -> bool:
        """At update 0, at every multiple of the gap (plus the weight's place in it when staggered), and, where a
        refresh could not be made, at the next update at which it can."""
        last, gap = int(state["last_refresh"]), group["update_proj_gap"]
        if last < 0:
            return True
        if gap == 0 or not self.rule.refreshes:
            return False
        offset = self._place * gap // len(self._peers) if group["stagger_refresh"] else 0
        return bool((step - offset) // gap > (last - offset) // gap)

    def refresh_reads_gradient(self, state: dict[str, Tensor], group: dict[str, Any], step: int) -> bool:
        """Whether this update takes a basis from the gradient: random ones it does not."""
        return self.refresh_is_due(state, group, step) and self.rule.reads_gradient(step)

    def observe(self, grad: Tensor) -> None:
        """Let the refresh of this update see `grad`, too."""
        total, count = self._observed
        self._observed = total + grad.to(torch.promote_types(grad.dtype, torch.float32)), count + 1

    def forget_observed(self) -> None:
        self._observed = (0, 0)

    def mean_with_observed(self, grad: Tensor) -> Tensor:
        """The gradient that a refresh of this update is made of."""
        total, count = self._observed
        return (total + grad) / (count + 1) if count else grad

    def project(self, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any], step: int) -> Projected:
        """`project_gradients` for this weight alone."""
        (projected,) = project_now([Arrival(self, state, grad, group, step)])
        return projected

    def project_in(self, bases: Bases, grad: Tensor) -> Tensor:
        """R of a gradient in these bases."""
        (low_rank_grad,) = run(_project([(self.projection, bases, grad)]))
        return low_rank_grad

    def put_in_place(self, state: dict[str, Tensor], projected: Projected) -> None:
        """Let the first bases take the place of the zeros before their update: they exist once. Until `apply` nothing
        counts them, and `clear_first` takes them back."""
        assert projected.new_bases is not None
        self.projection.store(state, projected.new_bases)
        projected.new_bases, projected.in_place = None, True

    def clear_first(self, state: dict[str, Tensor]) -> None:
        """Make zeros of first bases whose update did not take place."""
        if not int(state["refreshes"]):
            for side in self.projection.sides:
                for key in (side, side + SCALES):
                    if key in state:
                        state[key].zero_()

    @full_float32_products()
    def apply(
        self,
        state: dict[str, Tensor],
        projected: Projected,
        step: int,
        rule: UpdateRule,
        metrics: dict[str, list[Tensor]],
    ) -> None:
        """Store new bases, with the moments of `rule` rotated into them where the basis rule says so."""
        first = not int(state["refreshes"])
        if projected.failed:
            metrics.setdefault("failed_refreshes", []).append(torch.ones(()))
            if not first:  # with a basis to go on with, the next attempt is a gap away
                state["last_refresh"].fill_(step)
        if projected.new_bases is None and not projected.in_place:
            return
        metrics.setdefault("refreshed", []).append(torch.ones(()))
        if projected.energy is not None:
            metrics.setdefault("captured_energy", []).append(projected.energy)
        if (new := projected.new_bases) is not None:
            if not first:
                old = self.bases(state)
                metrics.setdefault("basis_overlap", []).append(overlap(old, new))
                self.rule.rotate_moments(state, self.projection, old, new, rule)
            self.projection.store(state, new)
        state["refreshes"] += 1
        state["last_refresh"].fill_(step)


@dataclass
class Arrival:
    """A gradient that is to be projected for its update."""

    subspace: Subspace
    state: dict[str, Tensor]
    grad: Tensor
    group: dict[str, Any]
    step: int

    def is_due(self) -> bool:
        return self.subspace.refresh_is_due(self.state, self.group, self.step)


def project_now(arrivals: Sequence[Arrival]) -> list[Projected]:
    """`project_gradients` from beginning to end; where bases are refreshed, in full float32."""
    with full_float32_products(any(each.is_due() for each in arrivals)):
        return run(project_gradients(arrivals))


@full_float32_products()
def draw_bases(arrivals: Sequence[Arrival]) -> list[Bases | None]:
    """New bases that do not depend on the gradients, of which only shapes, dtypes and devices are read. Nothing is
    stored; None, with a warning, where that fails."""
    found = run(_new_bases(arrivals, {id(each): _refresh(each, each.grad) for each in arrivals}))
    return [found.get(id(each)) for each in arrivals]


def project_gradients(arrivals: Sequence[Arrival]) -> Phases[list[Projected]]:
    """R of each gradient in the basis that its update uses, a new one where a refresh is due. Nothing is stored.

    A gradient with a NaN or an infinity never reaches the SVD, which would not return: it is projected with the old
    basis, stays non-finite, and its refresh stays due. So it does with a gradient of zeros (a layer below one that
    starts at zero, an expert without tokens), which has no subspace. A random basis needs no look at the gradient,
    and must not depend on one: with per-layer updates each rank sees its own.
    """
    due = [each for each in arrivals if each.is_due()]
    refreshes = yield from _usable_refreshes(due)
    new = yield from _new_bases(due, refreshes)
    bases = [new.get(id(each)) or each.subspace.bases(each.state) for each in arrivals]
    low_rank_grads = yield from _project(
        [(each.subspace.projection, its, each.grad) for each, its in zip(arrivals, bases, strict=True)]
    )
    found = [
        Projected(low_rank_grad, new.get(id(each)), failed=id(each) in refreshes and id(each) not in new)
        for each, low_rank_grad in zip(arrivals, low_rank_grads, strict=True)
    ]
    refreshed = [(each, projected) for each, projected in zip(arrivals, found, strict=True) if id(each) in refreshes]
    yield from _measure_energy(refreshed)
    return found


def _usable_refreshes(due: Sequence[Arrival]) -> Phases[dict[int, Refresh]]:
    """The refreshes that can be made, by the arrival's identity."""
    seen = [each.subspace.mean_with_observed(each.grad) for each in due]
    reads = [each.subspace.rule.reads_gradient(each.step) for each in due]
    flags = [
        Collective(flags_of(grad), each.subspace.projection.shard)
        for each, grad, reading in zip(due, seen, reads, strict=True)
        if reading
    ]
    answers = yield flags
    # One look at all of them: on a device each takes as long as everything that waits there.
    found = iter(torch.stack([each.to(answers[0].device) for each in answers]).tolist() if answers else [])
    refreshes = {}
    for each, grad, reading in zip(due, seen, reads, strict=True):
        if reading:
            not_finite, not_zero = next(found)
            if not_finite or not not_zero:
                continue
        refreshes[id(each)] = _refresh(each, grad)
    return refreshes


def _refresh(each: Arrival, grad: Tensor) -> Refresh:
    """What a basis rule is told; `grad` may be the mean over several."""
    subspace, number = each.subspace, int(each.state["refreshes"])
    bases = subspace.bases(each.state)
    seed = each.group["seed"]
    return Refresh(each.step, number, seed, subspace.name, grad, subspace.projection, bases, each.state)


def _new_bases(due: Sequence[Arrival], refreshes: dict[int, Refresh]) -> Phases[dict[int, Bases]]:
    """New bases as they will be read; none, with a warning, where no routine could decompose the gradient."""
    by_rule: dict[int, list[Arrival]] = {}
    for each in due:
        if id(each) in refreshes:
            by_rule.setdefault(id(each.subspace.rule), []).append(each)
    chosen = list(by_rule.values())
    asked = [(each[0].subspace.rule, [refreshes[id(one)] for one in each]) for each in chosen]
    computed = yield from together([phases(rule.compute_bases(theirs)) for rule, theirs in asked])
    new = {}
    for of_rule, results in zip(chosen, computed, strict=True):
        for each, bases in zip(of_rule, results, strict=True):
            subspace = each.subspace
            if isinstance(bases, LinAlgError):
                said = "the basis of %s could not be refreshed at update %d: %s%s"
                log.warning(said, subspace.name, each.step, bases, subspace.note)
                continue
            new[id(each)] = subspace.projection.as_read(bases)
    return new


def _project(parts: Sequence[tuple[Projection, Bases, Tensor]]) -> Phases[list[Tensor]]:
    """R of gradients in given bases, summed up where devices hold different parts of what is projected away."""
    found = [Collective(projection.project(bases, grad), projection.sum_shard) for projection, bases, grad in parts]
    return (yield found)


def _measure_energy(refreshed: Sequence[tuple[Arrival, Projected]]) -> Phases[None]:
    """‖R‖² / ‖G‖² of those that tried a refresh."""
    asked = []
    for each, projected in refreshed:
        projection = each.subspace.projection
        pairs = ((projected.low_rank_grad, projection.low_rank_shard), (each.grad, projection.shard))
        asked += [Collective(squared_norm(part), shard) for part, shard in pairs]
    sums = yield asked
    for place, (_, projected) in enumerate(refreshed):
        kept, whole = sums[2 * place], sums[2 * place + 1]
        projected.energy = torch.where(whole > 0, kept / whole, 1.0)
