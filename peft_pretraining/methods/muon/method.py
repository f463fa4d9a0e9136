"""Muon: the momentum of a matrix, orthogonalised (K. Jordan et al., 2024; for language models arXiv 2502.16982).

For a weight W (m, n), with G its gradient:

    M <- μ M + (1-μ) G,  U = (1-μ) G + μ M                                    (m, n)   optim/rules/momentum.py
    X = U / ‖U‖, transposed if m > n; five times:                             (p, q)   p <= q
        A = X Xᵀ,  X <- a X + (b A + c A²) X    a, b, c = 3.4445, -4.7750, 2.0315
    O = X, transposed back
    W <- W (1 - lr weight_decay) - lr f O

The iteration (Newton-Schulz, of a polynomial that is steep at 0) brings singular values to somewhere between 0.68 and
1.14, which is enough. f = 0.2 √max(m, n) gives the step the size of AdamW's (`match_rms`), so that its rate and decay
carry over; f = √max(1, m / n) is the original one (`spectral`).

NorMuon (arXiv 2510.05491) evens out the rows of O: methods/normuon.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.distributed.team import Team
from peft_pretraining.methods._matrices.method import MatrixTraining
from peft_pretraining.methods.muon.settings import NS_DTYPES, SCALES
from peft_pretraining.optim import (
    Collective,
    Direction,
    LowRankOptimizer,
    MatrixOptimizer,
    ParamUpdate,
    Phases,
    StateTensor,
)
from peft_pretraining.optim.rules.momentum import MomentumRule
from peft_pretraining.optim.rules.update_rule import mean_from, mean_over
from peft_pretraining.optim.tensors.mask import Mask
from peft_pretraining.optim.tensors.param_update import guarded

log = logging.getLogger("peft_pretraining")

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
_ROW_EPS = 1e-10


class MuonTraining(MatrixTraining):
    neuron_beta2: float | None = None

    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        rule = MuonRule(
            method.matrix_momentum,
            method.nesterov,
            scale=method.muon_scale,
            ns_dtype=method.muon_ns_dtype,
            neuron_beta2=self.neuron_beta2,
            shares_work=method.muon_shard_compute,
        )
        return {"rule": rule}

    def prepare(self, model: nn.Module, optimizer: LowRankOptimizer, reduce: Callable[[Tensor], Tensor]) -> None:
        super().prepare(model, optimizer, reduce)
        if not self.config.method.muon_shard_compute:
            return
        if Team.of_all().size == 1:
            log.warning("--muon_shard_compute has no effect on one process")
        elif self.config.distributed.distributed_type == "fsdp":
            log.warning(
                "--muon_shard_compute has no effect with --distributed_type fsdp, which divides the work anyway"
            )


class MuonRule(MomentumRule):
    """The orthogonalised momentum; with `neuron_beta2` its rows are divided by the root of their mean square over time
    (NorMuon)."""

    masks = True

    def __init__(
        self,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        scale: str = "match_rms",
        neuron_beta2: float | None = None,
        ns_steps: int = 5,
        ns_eps: float = 1e-7,
        ns_dtype: str = "auto",
        shares_work: bool = False,
    ):
        super().__init__(momentum, nesterov)
        self.shares_work = shares_work
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        if ns_dtype not in NS_DTYPES:
            raise ValueError(f"ns_dtype must be one of {', '.join(NS_DTYPES)}, got {ns_dtype!r}")
        if neuron_beta2 is not None and not 0 <= neuron_beta2 < 1:
            raise ValueError(f"neuron_beta2 must be at least 0 and below 1, or None, got {neuron_beta2}")
        self._like_adamw, self._neuron_beta2 = scale == "match_rms", neuron_beta2
        self._steps, self._eps, self._dtype = ns_steps, ns_eps, ns_dtype

    @property
    def name(self) -> str:
        return "muon" if self._neuron_beta2 is None else "normuon"

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        declared = super().declare_state(like, group, shard)
        if self._neuron_beta2 is not None:
            declared["row_mean_sq"] = StateTensor.along(like.new_zeros(len(like)), 0, shard)
        return declared

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        parts = yield from self._orthogonal(self.follow(updates), updates)
        if self._neuron_beta2 is not None:
            return (yield from self._by_rows(parts, updates))
        found: list[Direction | None] = []
        for part, update in zip(parts, updates, strict=True):
            m, n = _shape(update)
            size = 0.2 * math.sqrt(max(m, n)) if self._like_adamw else math.sqrt(max(1.0, m / n))
            found.append(Direction(part, update.rate * size))
        return found

    def _orthogonal(self, followed: list[Tensor], updates: Sequence[ParamUpdate]) -> Phases[list[Tensor]]:
        """This device's part of O for each U: the owner of a matrix iterates, and all others get what they need.

        What is iterated in 16 bits travels in 16 bits: O as it is, U with the norm that the iteration begins with.
        """
        own, shards = followed[0].dtype, [update.low_rank_shard for update in updates]
        narrow = iterates_in(self._dtype, followed[0]) if any(shard.team.size > 1 for shard in shards) else own
        if narrow != own and any(shard.dim is not None for shard in shards):
            squares = yield [Collective(*each) for each in zip(_squares(followed), shards, strict=True)]
            norms = torch._foreach_clamp_min(torch._foreach_sqrt(squares), self._eps)
            followed = [(u / norm).to(narrow) for u, norm in zip(followed, norms, strict=True)]
        wholes = yield [
            Collective(u, update.low_rank_shard, "to_owner", update.owner)
            for u, update in zip(followed, updates, strict=True)
        ]
        owned = [place for place, update in enumerate(updates) if update.is_owner]
        masks = [updates[place].mask for place in owned]
        orthogonal = orthogonalize([wholes[place] for place in owned], self._steps, self._eps, self._dtype, masks)
        for place, each in zip(owned, orthogonal, strict=True):
            wholes[place] = each
        parts = yield [
            Collective(whole.to(narrow), update.low_rank_shard, "from_owner", update.owner)
            for whole, update in zip(wholes, updates, strict=True)
        ]
        return [part.to(own) for part in parts]

    def _by_rows(self, parts: list[Tensor], updates: Sequence[ParamUpdate]) -> Phases[list[Direction | None]]:
        """NorMuon: O' = O with each row over the root of its mean square; the whole is then given its size."""
        assert self._neuron_beta2 is not None
        squares = yield [
            mean_over(square, -1, update.low_rank_shard, square.shape)
            for square, update in zip(torch._foreach_mul(parts, parts), updates, strict=True)
        ]
        mean_squares = [update.state["row_mean_sq"] for update in updates]
        means = [
            mean_from(square, -1, update.low_rank_shard, part.shape)
            for square, part, update in zip(squares, parts, updates, strict=True)
        ]
        with guarded(updates, "row_mean_sq"):
            torch._foreach_lerp_(mean_squares, means, 1 - self._neuron_beta2)
            roots = torch._foreach_add(torch._foreach_sqrt(mean_squares), _ROW_EPS)
        # (m, n) / (m, 1)
        evened = [part / root.unsqueeze(1) for part, root in zip(parts, roots, strict=True)]
        measured = evened if self._like_adamw else [*evened, *parts]
        shards = [update.low_rank_shard for update in updates] * (len(measured) // len(evened))
        norms = torch._foreach_sqrt(
            (yield [Collective(*each) for each in zip(_squares(measured), shards, strict=True)])
        )
        lengths = torch._foreach_add(norms[: len(evened)], _ROW_EPS)
        found: list[Direction | None] = []
        for place, (rows, length, update) in enumerate(zip(evened, lengths, updates, strict=True)):
            m, n = _shape(update)
            if self._like_adamw:
                found.append(Direction(rows.div_(length), update.rate * 0.2 * math.sqrt(m * n)))
            else:
                size = norms[len(evened) + place] / length
                found.append(Direction(rows.mul_(size), update.rate * math.sqrt(max(1.0, m / n))))
        return found


def _shape(update: ParamUpdate) -> tuple[int, int]:
    m, n = update.low_rank_shard.shape
    return m, n


def _squares(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """‖X‖² of each."""
    norms = torch._foreach_norm(list(parts))
    return torch._foreach_mul(norms, norms)


def orthogonalize(
    matrices: Sequence[Tensor],
    steps: int = 5,
    eps: float = 1e-7,
    dtype: str = "auto",
    masks: Sequence[Mask | None] | None = None,
) -> list[Tensor]:
    """Matrices (m, n) with the same singular vectors, and singular values near 1; those of one shape, or of a shape and
    the transposed one, as one batch. Zeros where a mask says that the update must leave no trace."""
    places: dict[tuple[int, int, int], list[int]] = {}
    for place, matrix in enumerate(matrices):
        m, n = matrix.shape
        places.setdefault((min(m, n), max(m, n), id(masks[place]) if masks else 0), []).append(place)
    found: list[Tensor] = [*matrices]
    for together in places.values():
        tall = {place for place in together if matrices[place].shape[0] > matrices[place].shape[1]}
        x = torch.stack([matrices[place].mT if place in tall else matrices[place] for place in together])
        if masks and (mask := masks[together[0]]) is not None:
            mask.zero_(x)
        for place, each in zip(together, _newton_schulz(x, steps, eps, dtype).unbind(), strict=True):
            found[place] = each.mT if place in tall else each
    return found


def iterates_in(dtype: str, like: Tensor) -> torch.dtype:
    """What the iteration is computed in, for matrices like one."""
    on_cuda = like.device.type in ("cuda", "meta")  # a simulated device is one of CUDA's
    return torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and on_cuda) else like.dtype


def _newton_schulz(x: Tensor, steps: int, eps: float, dtype: str) -> Tensor:
    """Of a batch (k, p, q) with p <= q, which is overwritten."""
    own, (a, b, c) = x.dtype, _POLYNOMIAL
    x = x.div_(torch.linalg.matrix_norm(x, keepdim=True).clamp_(min=eps)).to(iterates_in(dtype, x))
    for _ in range(steps):
        gram = x @ x.mT  # (k, p, p)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(own)


class Muon(MatrixOptimizer):
    """Muon for other loops: matrices as above, everything else by AdamW. `neuron_beta2` (0.95) makes it NorMuon.

    >>> weight = torch.nn.Parameter(torch.eye(4, 6))
    >>> optimizer = Muon([weight], lr=0.01)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'exp_avg': (4, 6)}

    `betas` and `eps` are AdamW's. `shares_work`: all processes of the default group have the same gradients (DDP), and
    each iterates for its share of the matrices; those that FSDP2 divides are dealt out in any case.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "match_rms",
        neuron_beta2: float | None = None,
        ns_steps: int = 5,
        ns_eps: float = 1e-7,
        ns_dtype: str = "auto",
        shares_work: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        **settings: Any,
    ):
        rule = MuonRule(
            momentum,
            nesterov,
            scale=scale,
            neuron_beta2=neuron_beta2,
            ns_steps=ns_steps,
            ns_eps=ns_eps,
            ns_dtype=ns_dtype,
            shares_work=shares_work,
        )
        matrices = {"rule": rule}
        super().__init__(params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
