"""Stable-SPAM: AdamW on gradients without spikes, of a running norm (arXiv 2502.17055).

For every parameter on its own, with gradient G at 0-based update t, k_n its updates so far and k those since the last
reset, this one included:

    g = max |G|,  T = EMA(g, θ),  T̂ = T / (1-θ^k_n);  entries with |G| > T̂ become G T̂ / g
    h = ‖G‖,  a = EMA(h, γ1'),  b = EMA(h², γ2);  G <- G / h  [a / (1-γ1'^k_n)] / [√(b / (1-γ2^k_n)) + ε]
    if (t + 1) % ΔT == 0:  M = V = 0, k = 1
    M = EMA(G, β1'),  V = EMA(G², β2)
    W <- W (1 - lr weight_decay) - lr [M / (1-β1'^k)] / [√(V / (1-β2^k)) + ε]

β1' = c β1 and γ1' = c γ1 with c = f + (1-f) (1 + cos(π (t+1) / (T+1))) / 2 fall over T updates.
After them c stays at f, where the cosine would rise again.

The authors' code still uses the old moments in the update of a reset, and sets k_n back with k, after which T̂ and the
norm are far off for hundreds of updates; here there are two counts, as in the paper's formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import hardshrink
from typing_extensions import Self

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.methods.groups import by_role
from peft_pretraining.optim import (
    Batch,
    Batches,
    Collective,
    Direction,
    LowRankOptimizer,
    ParamUpdate,
    Phases,
    StateTensor,
    UpdateRule,
)
from peft_pretraining.optim.own_groups import OwnGroups
from peft_pretraining.optim.rules.adamw import TorchStep
from peft_pretraining.optim.rules.batches import Maker, Part
from peft_pretraining.optim.rules.lengths import largest_magnitude, largest_of_parts
from peft_pretraining.optim.tensors.collectives import in_turn
from peft_pretraining.optim.tensors.mask import set_counters
from peft_pretraining.optim.tensors.state_tensor import counter, zeros


class StableSpamTraining(TrainingMethod[LowRankOptimizer]):
    def build_optimizer(self, model: nn.Module) -> LowRankOptimizer:
        method, settings = self.config.method, self.config.optimizer
        total = method.stable_spam_total
        rule = StableSpamRule(
            method.stable_spam_gamma1,
            method.stable_spam_gamma2,
            method.stable_spam_theta,
            gap=method.update_proj_gap,
            total=self.config.schedule.num_training_steps if total is None else total or None,
            floor=method.stable_spam_floor,
        )
        own = self.config.rule.arguments()
        everything = {"params": list(model.named_parameters()), "rule": rule, "betas": own["betas"]}
        groups = by_role(self.config, model, everything, adamw="torch_adamw")
        return LowRankOptimizer(groups, lr=settings.lr, weight_decay=settings.weight_decay, full_norm=True, **own)


_LARGEST, _NORM, _SQUARE = _RUNNING = ("running_max", "running_norm", "running_norm_sq")
"""What is kept of a parameter's gradients beside the moments: scalars."""


class StableSpamRule(UpdateRule):
    """Spikes cut, norm replaced, then AdamW with moments that begin anew every `gap` updates (0: never).

    Over devices: one maximum and one sum for all parameters. `total` updates is how long β1 and γ1 fall; None: they do
    not. A reset that is due in an update that is left out takes place in the next one.
    """

    masks = True
    decays_first = True
    betas = (0.9, 0.999)
    name = "stable_spam"

    def __init__(
        self,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        theta: float = 0.999,
        *,
        gap: int = 1000,
        total: int | None = None,
        floor: float = 0.5,
    ):
        for name, value in (("gamma1", gamma1), ("gamma2", gamma2), ("theta", theta)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        if gap < 0:
            raise ValueError(f"gap must be at least 0, got {gap}")
        self._gamma1, self._gamma2, self._theta = gamma1, gamma2, theta
        self._gap, self._total, self._floor = gap, total, floor

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float((group["betas"] or self.betas)[0])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        moments = {key: StateTensor.like_gradient(zeros(like), shard) for key in ("exp_avg", "exp_avg_sq")}
        wide = torch.promote_types(like.dtype, torch.float32)
        running = {key: StateTensor(like.new_zeros((), dtype=wide)) for key in _RUNNING}
        return {**moments, **running, "since_reset": StateTensor(counter(0)), "resets": StateTensor(counter(0))}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        batches = Batches(updates, apart=_count_since_reset)
        made = yield from in_turn([self._made(batch, group) for batch in batches], [batch.shard for batch in batches])
        for batch, direction in zip(batches, made, strict=True):
            batches.answer(batch, direction, batch.updates[0].rate)
        return batches.directions()

    def _made(self, batch: Batch, group: dict[str, Any]) -> Phases[Maker]:
        """[M / (1-β1'^k)] / [√(V / (1-β2^k)) + ε], rows at a time."""
        peaks = largest_of_parts(batch)
        (peak,) = yield [Collective(largest_magnitude(batch, peaks), batch.shard, "max")]
        cut = self._cutting(batch, peak, peaks)
        (square,) = yield [Collective(_square(batch, cut, peak), batch.shard)]
        factor = batch.across(self._norm_factor(batch, square, group["eps"]).to(batch.dtype))
        beta1, beta2 = group["betas"] or self.betas
        k, betas = self._count(batch), (beta1 * self._fade(batch), beta2)

        def of_rows(part: Part) -> TorchStep:
            grad = (cut(part) * factor).contiguous()
            return TorchStep(grad, part.state("exp_avg"), part.state("exp_avg_sq"), k, betas, group["eps"])

        return of_rows

    def _cutting(self, batch: Batch, peak: Tensor, peaks: dict[int | None, Tensor]) -> Callable[[Part], Tensor]:
        """What scales entries of G above the running maximum down together, the largest to it."""
        running = batch.state(_LARGEST)
        running.lerp_(peak.to(running.dtype), 1 - self._theta)
        limit = (running / (1 - self._theta**batch.k)).to(batch.dtype)
        factor = limit / torch.where(peak > 0, peak, 1.0)

        def cut(part: Part) -> Tensor:
            grad = part.grad
            if not batch.by_rows:
                return torch.where(grad.abs() > batch.across(limit), grad * batch.across(factor), grad)
            if peaks.get(part.start, peak) <= limit:
                return grad
            above = hardshrink(grad, float(limit))  # or zero; on the CPU several times as fast as a mask
            return torch.sub(grad, above).add_(above, alpha=float(factor))

        return cut

    def _norm_factor(self, batch: Batch, square: Tensor, eps: float) -> Tensor:
        """What gives each G the running norm; 1 where G is zero. In float64."""
        gamma1 = self._gamma1 * self._fade(batch)
        norm, k = square.sqrt(), batch.k
        mean, mean_square = batch.state(_NORM), batch.state(_SQUARE)
        mean.lerp_(norm.to(mean.dtype), 1 - gamma1)
        mean_square.lerp_(square.to(mean.dtype), 1 - self._gamma2)
        wanted = (mean.double() / (1 - gamma1**k)) / ((mean_square.double() / (1 - self._gamma2**k)).sqrt() + eps)
        return torch.where(norm > 0, wanted / torch.where(norm > 0, norm, 1.0), 1.0)

    def _fade(self, batch: Batch) -> float:
        """c, by which β1 and γ1 are smaller by now."""
        if self._total is None:
            return 1.0
        passed = min(batch.updates[0].step + 1, self._total + 1) / (self._total + 1)
        return self._floor + (1 - self._floor) * 0.5 * (1 + math.cos(math.pi * passed))

    def _count(self, batch: Batch) -> int:
        """k: one more update since the last reset, or the first one after it."""
        states = [update.state for update in batch.updates]
        due = (batch.updates[0].step + 1) // self._gap if self._gap else 0
        before = int(states[0]["since_reset"])
        if due > int(states[0]["resets"]):
            batch.state("exp_avg").zero_()
            batch.state("exp_avg_sq").zero_()
            set_counters([state["resets"] for state in states], due, batch.mask)
            before = 0
        set_counters([state["since_reset"] for state in states], before + 1, batch.mask)
        return before + 1


def _count_since_reset(update: ParamUpdate) -> tuple[int, int]:
    return int(update.state["since_reset"]), int(update.state["resets"])


def _square(batch: Batch, cut: Callable[[Part], Tensor], peak: Tensor) -> Tensor:
    """‖G‖² after the cut, float64: of rows' norms in float32 where their squares have room there."""
    in_float = batch.by_rows and batch.axes and 1e-12 < float(peak) < 1e12
    axes, dtype = (-1 if in_float else batch.axes), (batch.dtype if in_float else torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=batch.grad.device)
    for part in batch.parts():
        norms = torch.linalg.vector_norm(cut(part), dim=axes, dtype=dtype) if batch.axes else cut(part).double()
        squares = norms.double().square()
        total = total + (squares.sum() if in_float else squares)
    return total


class StableSPAM(OwnGroups):
    """Stable-SPAM for other loops, for all parameters alike. `total`: updates over which β1 and `gamma1` fall (None:
    they do not), for which 0-based updates are counted by `begin_update`, or by the parameters' own.

    >>> weight = torch.nn.Parameter(torch.ones(4, 6))
    >>> optimizer = StableSPAM([weight], lr=0.01, gap=500)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> round(float(optimizer.state[weight]["running_max"]), 6)
    0.002
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        theta: float = 0.999,
        gap: int = 1000,
        total: int | None = None,
        floor: float = 0.5,
        weight_decay: float = 0.0,
        state_format: str = "float32",
        rounding: str = "nearest",
        **settings: Any,
    ):
        rule = StableSpamRule(gamma1, gamma2, theta, gap=gap, total=total, floor=floor)
        own = {"rule": rule, "state_format": state_format, "rounding": rounding, "betas": betas}
        super().__init__(
            params,
            partial(_completed, own),
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            full_norm=True,
            **settings,
        )

    @classmethod
    def from_model(cls, model: nn.Module, **settings: Any) -> Self:
        """The optimizer of all parameters of a model that are trained."""
        return cls([(name, param) for name, param in model.named_parameters() if param.requires_grad], **settings)


def _completed(own: Mapping[str, Any], group: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**own, **group}]
