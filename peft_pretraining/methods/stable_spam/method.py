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
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.methods.groups import by_role
from peft_pretraining.optim import Collective, Direction, LowRankOptimizer, ParamUpdate, Phases, StateTensor, UpdateRule
from peft_pretraining.optim.own_groups import OwnGroups
from peft_pretraining.optim.rules.torch_adamw import torch_step
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
        peaks = yield [Collective(_largest(update.low_rank_grad), update.low_rank_shard, "max") for update in updates]
        cut = [self._cut(update, peak) for update, peak in zip(updates, peaks, strict=True)]
        squares = yield [
            Collective(torch.linalg.vector_norm(each, dtype=torch.float64).square(), update.low_rank_shard)
            for each, update in zip(cut, updates, strict=True)
        ]
        for each, square, update in zip(cut, squares, updates, strict=True):
            each.mul_(self._norm_factor(update, square, group["eps"]).to(each.dtype))
            self._count(update)
        beta1, beta2 = group["betas"] or self.betas
        minus_d = [torch.zeros_like(each) for each in cut]
        for (k, fade), places in _places(updates, self._fade).items():
            torch_step(
                [minus_d[place] for place in places],
                [cut[place] for place in places],
                [updates[place].state["exp_avg"] for place in places],
                [updates[place].state["exp_avg_sq"] for place in places],
                [torch.tensor(k - 1.0, device=cut[place].device) for place in places],  # which torch increments
                {"betas": (beta1 * fade, beta2), "lr": 1.0, "weight_decay": 0.0, "eps": group["eps"]},
            )
        return [Direction(each, -update.rate) for each, update in zip(minus_d, updates, strict=True)]

    def _cut(self, update: ParamUpdate, peak: Tensor) -> Tensor:
        """A copy of G whose entries above the running maximum are scaled down together, the largest to it."""
        grad, running = update.low_rank_grad, update.state[_LARGEST]
        running.lerp_(peak.to(running.dtype), 1 - self._theta)
        limit = (running / (1 - self._theta**update.k)).to(grad.dtype)
        factor = limit / torch.where(peak > 0, peak, 1.0)
        return torch.where(grad.abs() > limit, grad * factor, grad).contiguous()

    def _norm_factor(self, update: ParamUpdate, square: Tensor, eps: float) -> Tensor:
        """What gives G the running norm; 1 where G is zero. A float64 scalar."""
        state, gamma1 = update.state, self._gamma1 * self._fade(update)
        norm, k = square.sqrt(), update.k
        mean, mean_square = state[_NORM], state[_SQUARE]
        mean.lerp_(norm.to(mean.dtype), 1 - gamma1)
        mean_square.lerp_(square.to(mean.dtype), 1 - self._gamma2)
        wanted = (mean.double() / (1 - gamma1**k)) / ((mean_square.double() / (1 - self._gamma2**k)).sqrt() + eps)
        return torch.where(norm > 0, wanted / torch.where(norm > 0, norm, 1.0), 1.0)

    def _fade(self, update: ParamUpdate) -> float:
        """c, by which β1 and γ1 are smaller by now."""
        if self._total is None:
            return 1.0
        passed = min(update.step + 1, self._total + 1) / (self._total + 1)
        return self._floor + (1 - self._floor) * 0.5 * (1 + math.cos(math.pi * passed))

    def _count(self, update: ParamUpdate) -> None:
        """One more update since the last reset, or the first one after it."""
        state = update.state
        due = (update.step + 1) // self._gap if self._gap else 0
        if due > int(state["resets"]):
            state["resets"].fill_(due)
            state["since_reset"].zero_()
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        state["since_reset"] += 1


def _largest(grad: Tensor) -> Tensor:
    """max |G|; 0 of a part without entries."""
    return grad.abs().amax() if grad.numel() else grad.new_zeros(())


def _places(updates: Iterable[ParamUpdate], fade: Any) -> dict[tuple[int, float], list[int]]:
    """Places of updates that are the k-th since their reset, with the same c."""
    places: dict[tuple[int, float], list[int]] = {}
    for place, update in enumerate(updates):
        places.setdefault((int(update.state["since_reset"]), fade(update)), []).append(place)
    return places


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
