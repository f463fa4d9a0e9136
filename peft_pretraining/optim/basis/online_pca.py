"""Online Subspace Descent: the basis is a parameter with an optimizer of its own (arXiv 2408.12857)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft_pretraining.distributed.sharding import ShardInfo
from peft_pretraining.optim.basis.basis_rule import own_state
from peft_pretraining.optim.basis.reconstruction import reconstruction_gradients
from peft_pretraining.optim.basis.svd_basis import SVDBasis
from peft_pretraining.optim.rules.lifts import LIFTS
from peft_pretraining.optim.rules.update_rules import SGD, Adafactor, AdamW, AdamW8bit, Lion, UpdateRule
from peft_pretraining.optim.tensors.collectives import Phases, in_lots, phases
from peft_pretraining.optim.tensors.mask import count
from peft_pretraining.optim.tensors.param_update import ParamUpdate, by_mask
from peft_pretraining.optim.tensors.projection import Bases, Projection
from peft_pretraining.optim.tensors.state_tensor import StateTensor, counter, counts

BASIS_OPTIMIZERS: dict[str, tuple[Callable[[], UpdateRule], dict[str, Any]]] = {
    "continuous": (
        lambda: AdamW(torch_epsilon=True),
        {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    ),
    "continuous_adam8bit": (
        lambda: AdamW8bit(torch_epsilon=True),
        {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    ),
    "continuous_lion": (Lion, {"betas": (0.9, 0.99), "weight_decay": 0.0}),
    "continuous_adafactor": (Adafactor, {"beta1": None, "weight_decay": 0.0}),
    "continuous_sgd": (SGD, {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}),
}
"""Update rule and settings of the basis optimizers, by `proj_type`."""

_NUMBERS_AT_ONCE = 2**25
"""Of the bases that move at a time: their gradients exist together, and are added up over devices by one call."""


class OnlinePCA(SVDBasis):
    """Algorithm 1: the basis starts from an SVD, and after every later update takes a step on the reconstruction loss
    ‖Ĝ QᵀQ - Ĝ‖² with Ĝ = G / ‖G‖, at 1 / update_proj_gap times the weights' schedule. It is never orthonormalised
    again."""

    masks = True
    refreshes = False
    reads_every_gradient = True

    def __init__(self, svd_method: str, proj_type: str):
        super().__init__(svd_method)
        rule, self._settings = BASIS_OPTIMIZERS[proj_type]
        self._rule = rule()
        self.older = frozenset(f"basis_{key}" for key in self._rule.older)

    @property
    def kind(self) -> tuple[Any, ...]:
        return (*super().kind, type(self._rule))

    def declare_state(self, bases: Bases, projection: Projection, group: dict[str, Any]) -> dict[str, StateTensor]:
        (basis,) = bases.values()
        own = self._rule.declare_state(basis, self._settings, ShardInfo(basis.shape))
        return {"basis_step": StateTensor(counter(0)), **{f"basis_{key}": tensor for key, tensor in own.items()}}

    def declare_older_state(self, bases: Bases) -> dict[str, StateTensor]:
        (basis,) = bases.values()
        own = self._rule.declare_older_state(basis, ShardInfo(basis.shape))
        return {f"basis_{key}": tensor for key, tensor in own.items()}

    def advance(self, updates: Sequence[ParamUpdate], pace: float) -> Phases[None]:
        for lot in in_lots(updates, _numbers_of_basis, _NUMBERS_AT_ONCE):
            yield from self._advance(lot, pace)

    def _advance(self, updates: Sequence[ParamUpdate], pace: float) -> Phases[None]:
        moved = [update.bases for update in updates]
        gradients = yield from reconstruction_gradients(updates, moved)
        settings = {**self._settings, "lr": pace}
        own = [own_state(update.state, "basis_") for update in updates]
        for mask, masked in by_mask(updates):
            count([update.state["basis_step"] for update in masked], mask)
        known = counts([state["step"] for state in own])
        steps = []
        for update, bases, state, k, gradient in zip(updates, moved, own, known, gradients, strict=True):
            (basis,) = bases.values()
            steps.append(
                ParamUpdate(
                    name=update.name,
                    index=update.index,
                    weight=basis,
                    low_rank_grad=gradient,
                    state=state,
                    step=update.step,
                    rate=pace,
                    low_rank_shard=ShardInfo(basis.shape),
                    decay=pace * settings["weight_decay"],
                    decays_first=True,  # as torch's AdamW
                    mask=update.mask,
                    count=k,
                )
            )
        directions = yield from phases(self._rule.directions(steps, settings))
        for step, direction in zip(steps, directions, strict=True):
            step.direction = direction
        yield from phases(LIFTS[self._rule.lift or "identity"]().move(steps, settings))
        for update, bases in zip(updates, moved, strict=True):
            update.projection.store(update.state, bases)  # where they are kept in another dtype


def _numbers_of_basis(update: ParamUpdate) -> int:
    return sum(basis.numel() for basis in update.bases.values())
