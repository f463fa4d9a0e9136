"""What becomes of gradients between the backward pass and the step: projected, observed, measured, scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import ShardInfo, whole_norm
from peft_pretraining.optim.basis.subspace import Arrival, project_now
from peft_pretraining.optim.state.base import grad_of, gradient_of
from peft_pretraining.optim.state.subspace_state import SubspaceOptimizer
from peft_pretraining.optim.tensors.collectives import Collective, Phases, run


class ProjectedGradients(SubspaceOptimizer):
    """Answers the training loop's questions about gradients, of which it sees R where there is a projection."""

    full_norm: bool
    """Whether `grad_norm` is that of the full gradients."""
    refresh_accumulation: int
    """Total batches whose mean gradient a refresh is made of."""

    def begin_update(self, step: int, frozen: bool = False) -> None:
        self.update_step = step
        self.refresh_metrics = {}
        self._forget()
        if self.backward is not None:
            self.backward.begin(step)
        for follower in self._followers:
            follower.begin(frozen)

    def begin_micro_batch(self, index: int, count: int) -> None:
        if self.backward is not None:
            self.backward.begin_micro_batch(index, count)
        for follower in self._followers:
            follower.begin_micro_batch(index, count)

    def step_of(self, param: Tensor) -> int:
        """The 0-based update that a parameter is at."""
        return int(self.state[param]["step"]) if self.update_step is None else self.update_step

    def some_refresh_reads_gradients(self) -> bool:
        """Whether some basis will be taken from this update's gradient."""
        return any(
            self.subspaces[param].refresh_reads_gradient(self.state[param], group, self.step_of(param))
            for group in self.param_groups
            for param in group["params"]
            if param in self.subspaces
        )

    def wants_extra_batches(self) -> int:
        further = self.refresh_accumulation - 1
        return further if further and self.some_refresh_reads_gradients() else 0

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Let refreshes that are due see these gradients, too: their SVD is of the mean over all that were observed and
        the update's own (large-batch GaLore, arXiv 2410.11289, section 5). The update itself does not see them."""
        if self.backward is not None:
            self.backward.observe()
        for param, group in self._with_gradients():
            subspace = self.subspaces.get(param)
            if self._comes_projected(param):
                continue
            if subspace and subspace.refresh_reads_gradient(self.state[param], group, self.step_of(param)):
                subspace.observe(gradient_of(param))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project every gradient that is not projected yet or has changed since, refreshing bases that are due. Nothing
        is stored."""
        if not self.subspaces:
            return
        if self.backward is not None:
            self.backward.complete()
        params, arrivals = [], []
        for param, group in self._with_gradients():
            if self.backward is not None and self._comes_projected(param):
                if param not in self.projected:
                    self.projected[param] = self.backward.take(param)
                continue
            waiting, subspace = self.projected.get(param), self.subspaces.get(param)
            if subspace is None or (waiting and waiting.is_of(grad_of(param))):
                continue
            params.append(param)
            state, grad = self.local_state(param), gradient_of(param)
            arrivals.append(Arrival(subspace, state, grad, group, self.step_of(param)))
        for param, projected in zip(params, project_now(arrivals), strict=True):
            waiting, grad = self.projected.get(param), grad_of(param)
            projected.look_at(grad)
            if waiting and waiting.source is grad:  # further passes into the same tensor, or a change of it
                projected.scale(waiting.scaled_by)
            self.projected[param] = projected

    def _comes_projected(self, param: Tensor) -> bool:
        return self.backward is not None and self.backward.comes_from_here(param)

    def gradients(self) -> list[Tensor]:
        """The gradients as this optimizer sees them: R of the projected weights, the full gradient of the others, this
        device's parts."""
        self.project_gradients()
        return [
            self.projected[param].low_rank_grad if param in self.subspaces else gradient_of(param)
            for param, _ in self._with_gradients()
        ]

    def grad_norm(self) -> Tensor:
        """Global 2-norm, over all devices, of `gradients`; of the full gradients with `full_norm`, and of those whose
        lift reads them; a scalar. With per-layer updates it is that of the update's gradients before clipping."""
        for follower in self._followers:
            return follower.grad_norm()
        if self.full_norm:
            self.project_gradients()
            return super().grad_norm()
        return whole_norm(self._gradient_parts())

    def _gradient_parts(self) -> list[tuple[Tensor, ShardInfo]]:
        parts = []
        for (param, _), gradient in zip(self._with_gradients(), self.gradients(), strict=True):
            slot = self._slots[param]
            if slot.objects.lift.reads_gradient:
                parts.append((gradient_of(param), slot.shard))
            else:
                parts.append((gradient, slot.low_rank_shard))
        return parts

    def scale_(self, factor: Tensor) -> None:
        """Multiplies `gradients()` by a scalar, in place, and the full gradients that lifts read. Per-layer updates
        have clipped each gradient by itself, and are left alone."""
        if self._followers:
            return
        gradients = self.gradients()
        read = {param for param in self.projected if self._slots[param].objects.lift.reads_gradient}
        if gradients:
            torch._foreach_mul_(gradients + [gradient_of(param) for param in read], factor)
        products: dict[int, tuple[Any, Tensor]] = {}  # one for all that were scaled alike
        for param, projected in self.projected.items():
            if param in read:
                projected.look_at(grad_of(param))  # both were scaled
                continue
            before = projected.scaled_by
            if id(before) not in products:
                products[id(before)] = before, before * factor
            projected.scaled_by = products[id(before)][1]

    def metrics(self) -> dict[str, float]:
        """Means and smallest values of captured energy and overlap over the layers that the last update refreshed."""
        metrics, self.refresh_metrics = summary(self.refresh_metrics), {}
        return {**super().metrics(), **metrics}


def summary(refreshes: dict[str, list[Tensor]]) -> dict[str, float]:
    """Mean and smallest captured energy and overlap over the layers that an update refreshed; failures counted."""
    metrics: dict[str, float] = {}
    for name in ("captured_energy", "basis_overlap"):
        if values := refreshes.get(name):
            stacked = torch.stack([value.float() for value in values])
            metrics[f"{name}_mean"], metrics[f"{name}_min"] = stacked.mean().item(), stacked.min().item()
    if "refreshed" in refreshes:
        metrics["refreshed_layers"] = len(refreshes["refreshed"])
    if "failed_refreshes" in refreshes:
        metrics["failed_refreshes"] = len(refreshes["failed_refreshes"])
    return metrics


def wide_norm(parts: Sequence[tuple[Tensor, ShardInfo]]) -> Tensor:
    """`whole_norm`, in float64 where it overflowed: then it is finite if every number is."""
    norm = whole_norm(parts)
    return norm if norm.isfinite() else whole_norm([(part.double(), shard) for part, shard in parts])


def not_finite(parts: Sequence[tuple[Tensor, ShardInfo]]) -> Tensor:
    """1 if some number is not finite on any device, else 0: a float32 scalar, which is not read."""
    flags = [Collective((~part.isfinite().all()).float(), shard, "max") for part, shard in parts]
    answers = run(_asked(flags))
    return torch.stack([answer.to(answers[0].device) for answer in answers]).amax()


def _asked(collectives: list[Collective]) -> Phases[list[Tensor]]:
    return (yield collectives)
