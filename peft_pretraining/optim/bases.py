"""Basis rules: where the subspaces come from in which gradients are seen, and when they change.

| `proj_type` | rule |
|---|---|
| `std reverse_std left right full` | `SVDBasis` (GaLore), or with a `rand_ratio` `SVDThenRandom` (GoLore) |
| `random` | `GaussianBasis` (Online Subspace Descent's ablation) |
| `continuous*` | `OnlinePCA` (Online Subspace Descent) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peft_pretraining import rng
from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.projection import LEFT, RIGHT, SIDES, Bases, Projection
from peft_pretraining.optim.svd import SVD_METHODS, gram_eigenvectors, random_stiefel, top_singular_vectors, with_signs
from peft_pretraining.optim.update_rules import SGD, Adafactor, AdamW, AdamW8bit, Lion, UpdateRule

BASIS_OPTIMIZERS: dict[str, tuple[type[UpdateRule], dict[str, Any]]] = {
    "continuous": (AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}),
    "continuous_adam8bit": (AdamW8bit, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
    "continuous_lion": (Lion, {"betas": (0.9, 0.99), "weight_decay": 0.0}),
    "continuous_adafactor": (Adafactor, {"beta1": None, "weight_decay": 0.0}),
    "continuous_sgd": (SGD, {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}),
}
"""Update rule and settings of the basis optimizers of Online Subspace Descent, by `proj_type`."""

_SMALLEST_SQUARE = 1e-30
"""Of a gradient's norm, for online PCA: eight digits above the smallest normal float32 (and bf16)."""

PROJECTION_TYPES = (*SIDES, "random", *BASIS_OPTIMIZERS)


@dataclass(frozen=True)
class Refresh:
    """One refresh of one parameter's basis."""

    step: int
    """0-based update."""
    number: int
    """How many refreshes this parameter has had before."""
    seed: int
    name: str
    """The parameter's."""

    def generator(self, purpose: str) -> torch.Generator:
        """A pure function of (seed, parameter's name, refresh number), and so the same on every rank."""
        return rng.generator(self.seed, f"{purpose} of {self.name}", step=self.number)


class BasisRule:
    """Makes the bases of one projection. Bases are orthonormal unless the rule says otherwise."""

    carries_momentum = False
    """Whether the first moment moves into a new basis, or its coordinates are simply read in the new one."""
    refreshes = True
    """Whether bases are made anew at every `update_proj_gap`, after the first."""

    older: frozenset[str] = frozenset()
    """Keys of the rule's own tensors that only the states of older versions have."""

    def __init__(self, projection: Projection, svd_method: str = "gram"):
        self.projection = projection
        self.svd_method = svd_method

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two rules share whose states are interchangeable."""
        return type(self), self.projection.sides

    def init_older_state(self, state: dict[str, Any]) -> None:
        """Replace the rule's own tensors by those of older versions."""

    def init_state(self, state: dict[str, Any], param: Tensor) -> None:
        """Create the rule's own tensors."""

    def reads_gradient(self, step: int) -> bool:
        """Whether a refresh at this update depends on the gradient."""
        return True

    def refreshed(self, old: Bases, grad: Tensor, refresh: Refresh) -> Bases:
        """New bases for a finite `grad` (m, n), in float32 or float64; nothing is stored. Raises `LinAlgError`."""
        raise NotImplementedError

    def advance(
        self, state: dict[str, Any], grad: Tensor, low_rank_grad: Tensor, scaled_by: Tensor | float, lr: float
    ) -> None:
        """After the weight has moved, without a refresh. `low_rank_grad` is R of `grad`, times `scaled_by`."""


class SVDBasis(BasisRule):
    """GaLore's rule: the top singular vectors of the current gradient (arXiv 2403.03507, algorithm 2)."""

    def refreshed(self, old: Bases, grad: Tensor, refresh: Refresh) -> Bases:
        start = old if refresh.number else {}
        sides, rank = self.projection.sides, self.projection.rank
        sketch = refresh.generator("sketch")
        shard = self.projection.shard
        short_side = RIGHT if shard.shape[0] >= shard.shape[1] else LEFT
        if shard.dim is not None and self.svd_method == "gram" and sides == (short_side,) and not (
            self.projection.divides_projected_side
        ):  # fmt: skip
            new = gram_eigenvectors(grad, rank, short_side, shard.sum)
        else:
            new = top_singular_vectors(shard.gather(grad), rank, sides, self.svd_method, start, sketch)
        return {side: with_signs(new[side], start.get(side), dim=0 if side == LEFT else 1) for side in sides}


class RandomBasis(BasisRule):
    """GoLore's rule: bases uniform on the Stiefel manifold, independent of the gradient (arXiv 2410.11289)."""

    carries_momentum = True

    def reads_gradient(self, step: int) -> bool:
        return False

    def refreshed(self, old: Bases, grad: Tensor, refresh: Refresh) -> Bases:
        m, n = self.projection.shard.shape
        new: Bases = {}
        for side in self.projection.sides:
            drawn = random_stiefel(
                m if side == LEFT else n, self.projection.rank, refresh.generator(f"random {side}"), grad.device
            )
            new[side] = drawn if side == LEFT else drawn.T
        return new


class SVDThenRandom(BasisRule):
    """GoLore: SVD at first, random from the update t on with t / num_training_steps >= rand_ratio (algorithm 1)."""

    carries_momentum = True

    def __init__(self, projection: Projection, svd_method: str, rand_ratio: float, num_training_steps: int):
        super().__init__(projection, svd_method)
        self.rand_ratio, self.num_training_steps = rand_ratio, num_training_steps
        self._svd, self._random = SVDBasis(projection, svd_method), RandomBasis(projection)

    def reads_gradient(self, step: int) -> bool:
        # A ratio beyond 1 means never random, also in updates after the schedule's end.
        return self.rand_ratio > 1 or step / self.num_training_steps < self.rand_ratio

    def refreshed(self, old: Bases, grad: Tensor, refresh: Refresh) -> Bases:
        rule = self._svd if self.reads_gradient(refresh.step) else self._random
        return rule.refreshed(old, grad, refresh)


class GaussianBasis(SVDBasis):
    """The top singular vectors of a fresh Gaussian matrix of the gradient's shape: the ablation `random` of Online
    Subspace Descent (arXiv 2408.12857). A random subspace, but, as in GaLore, the moments stay as they are."""

    def reads_gradient(self, step: int) -> bool:
        return False

    def refreshed(self, old: Bases, grad: Tensor, refresh: Refresh) -> Bases:
        shape = self.projection.shard.shape
        noise = torch.randn(shape, generator=refresh.generator("gaussian matrix"), dtype=torch.float32)
        whole = GaussianBasis(replace(self.projection, shard=ShardInfo(shape)), self.svd_method)
        return SVDBasis.refreshed(whole, old, noise.to(grad.device), refresh)


class OnlinePCA(SVDBasis):
    """Online Subspace Descent (arXiv 2408.12857, algorithm 1): the basis is a parameter with an optimizer of its own.

    It starts from an SVD, and after every later update takes a step on the reconstruction loss ‖Ĝ QᵀQ - Ĝ‖² with
    Ĝ = G / ‖G‖, at 1 / update_proj_gap times the weights' schedule. It is never orthonormalised again.
    """

    refreshes = False

    def __init__(self, projection: Projection, svd_method: str, proj_type: str):
        super().__init__(projection, svd_method)
        rule, self._settings = BASIS_OPTIMIZERS[proj_type]
        self._rule = rule(torch_epsilon=True) if rule in (AdamW, AdamW8bit) else rule()
        (self._side,) = projection.sides
        self.older = frozenset(f"basis_{key}" for key in self._rule.older)

    @property
    def kind(self) -> tuple[Any, ...]:
        return (*super().kind, type(self._rule))

    def init_state(self, state: dict[str, Any], param: Tensor) -> None:
        state["basis_step"] = torch.zeros((), dtype=torch.int64)
        own: dict[str, Any] = {}
        self._rule.init_state(own, state[self._side], self._settings, ShardInfo(state[self._side].shape))
        state.update({f"basis_{key}": value for key, value in own.items()})

    def init_older_state(self, state: dict[str, Any]) -> None:
        own: dict[str, Any] = {}
        self._rule.init_older_state(own, state[self._side], ShardInfo(state[self._side].shape))
        state.update({f"basis_{key}": value for key, value in own.items()})

    def advance(
        self, state: dict[str, Any], grad: Tensor, low_rank_grad: Tensor, scaled_by: Tensor | float, lr: float
    ) -> None:
        basis, settings = state[self._side], {**self._settings, "lr": lr}
        own = {key.removeprefix("basis_"): value for key, value in state.items() if key.startswith("basis_")}
        own["step"] += 1
        shard = self.projection.shard
        if self.projection.divides_projected_side:
            grad, shard = shard.gather(grad), ShardInfo(shard.shape)
        gradient = reconstruction_gradient(self._side, basis, grad, low_rank_grad, shard.sum)
        gradient.div_(scaled_by)  # it is linear in R
        direction, factor = self._rule.direction(own, gradient, settings, ShardInfo(basis.shape))
        if settings["weight_decay"]:
            basis.mul_(1 - lr * settings["weight_decay"])  # before the step, as torch's AdamW
        basis.add_(self._rule.finish(direction), alpha=-factor)


def reconstruction_gradient(
    side: str,
    basis: Tensor,
    grad: Tensor,
    low_rank_grad: Tensor,
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """∇L of the loss L(Q) = ‖Ĝ QᵀQ - Ĝ‖² with Ĝ = G / ‖G‖, in the shape of the basis (left: L(P) = ‖P PᵀĜ - Ĝ‖²).

    `low_rank_grad` is R = G Qᵀ (m, r) or Pᵀ G (r, n) for the same G. With E = R Q - G and T = RᵀG the definition,
    2 (Q Eᵀ G + Q Gᵀ E), becomes 2 [(QQᵀ - 2 I) T + (T Qᵀ) Q]: one product with G and four with r x r factors, and
    nothing of the size m x m or n x n. `add_up` sums over devices that hold different parts of G and R.
    """
    flat = grad.reshape(-1)
    square = add_up(torch.dot(flat, flat).double())  # a single pass, where a norm takes two
    # A zero gradient has no direction, and one whose square underflows has lost it: the basis stays.
    factor = torch.where(square > _SMALLEST_SQUARE, 2 / square, 0)
    if side == RIGHT:
        cross = add_up(low_rank_grad.T @ grad)  # (r, m) @ (m, n) -> (r, n)
        inner = basis @ basis.T  # (r, r)
        inner.diagonal().sub_(2)
        return (inner @ cross).addmm_(cross @ basis.T, basis).mul_(factor)
    cross = add_up(grad @ low_rank_grad.T)  # (m, n) @ (n, r) -> (m, r)
    inner = basis.T @ basis  # (r, r)
    inner.diagonal().sub_(2)
    return (cross @ inner).addmm_(basis, basis.T @ cross).mul_(factor)


def check_names(group: dict[str, Any]) -> None:
    """Raises `ValueError` for a kind of projection or decomposition that does not exist."""
    if group["proj_type"] not in PROJECTION_TYPES:
        raise ValueError(f"proj_type must be one of {', '.join(PROJECTION_TYPES)}, got {group['proj_type']!r}")
    if group["svd_method"] not in SVD_METHODS:
        raise ValueError(f"svd_method must be one of {', '.join(SVD_METHODS)}, got {group['svd_method']!r}")


def basis_rule(group: dict[str, Any], shape: torch.Size | ShardInfo) -> BasisRule:
    """The rule for one weight, as its parameter group asks. Raises `ValueError` for settings that contradict."""
    proj_type, rand_ratio = group["proj_type"], group["rand_ratio"]
    check_names(group)
    if group["rank"] < 1 or group["update_proj_gap"] < 0:
        raise ValueError(f"rank must be at least 1, got {group['rank']}; "
                         f"update_proj_gap at least 0, got {group['update_proj_gap']}")  # fmt: skip
    projection = Projection.for_weight(proj_type if proj_type in SIDES else "std", group["rank"], shape)
    if rand_ratio is not None and proj_type not in SIDES:
        raise ValueError(f"rand_ratio (GoLore) goes with proj_type {', '.join(SIDES)}, got {proj_type!r}")
    if rand_ratio is not None:
        if group["num_training_steps"] is None and 0 < rand_ratio <= 1:
            raise ValueError(f"rand_ratio {rand_ratio} needs num_training_steps in the same group")
        return SVDThenRandom(projection, group["svd_method"], rand_ratio, group["num_training_steps"] or 1)
    if proj_type == "random":
        return GaussianBasis(projection, group["svd_method"])
    if proj_type in BASIS_OPTIMIZERS:
        if group["update_proj_gap"] == 0:
            raise ValueError(f"update_proj_gap must not be 0 with {proj_type}: the basis learns at a rate of 1 / gap")
        return OnlinePCA(projection, group["svd_method"], proj_type)
    return SVDBasis(projection, group["svd_method"])
