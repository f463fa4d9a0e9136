"""SCALE: SGD whose gradient is normalised for each output unit, with a momentum in the head (arXiv 2506.16659).

    matrices (m, n):         U_i = G_i / max(rms(G_i), 1e-8), for each row i: m output units; no state
    head (vocabulary, d):    M <- μ M + (1-μ) G, and the same for its rows, one for each token
    embedding (vocabulary, d):  U_j = G_j / max(rms(G_j), 1e-8), for each column j: its d outputs; no state
    W <- W (1 - lr weight_decay) - lr U

and AdamW for vectors, at `--adam_lr`. The authors' code divides by the root mean square over a row or column, the paper
by its 2-norm (`--scale_norm l2`). A tied embedding is the head.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from peft_pretraining.methods._matrices.method import MatrixTraining
from peft_pretraining.methods.scale.settings import NORMS
from peft_pretraining.optim import Batches, Direction, LowRankOptimizer, MatrixOptimizer, ParamUpdate, Phases, roles_of
from peft_pretraining.optim.model_groups import TARGET_MODULES, model_groups
from peft_pretraining.optim.rules.lengths import over_lengths
from peft_pretraining.optim.rules.momentum import MomentumRule
from peft_pretraining.optim.tensors.collectives import together

log = logging.getLogger("peft_pretraining")

ROLES = ("hidden", "head", "embedding")


class ScaleTraining(MatrixTraining):
    def matrices(self) -> dict[str, Any]:
        return self._settings("hidden")

    def table(self, role: str) -> dict[str, Any]:
        return {**self.projection(), **self._settings(role)}

    def _settings(self, role: str) -> dict[str, Any]:
        method = self.config.method
        return {"rule": rule_for(role, method.matrix_momentum, method.scale_norm)}

    def build_optimizer(self, model: nn.Module) -> LowRankOptimizer:
        if "lm_head.weight" not in dict(model.named_parameters()) and getattr(model, "lm_head", None) is not None:
            log.info("the embedding is tied to the head: its rule is the head's")
        return super().build_optimizer(model)


def rule_for(role: str, momentum: float = 0.9, norm: str = "rms", norm_eps: float = 1e-8) -> ScaleRule:
    """The rule of hidden matrices, of the head or of the embedding."""
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    return ScaleRule(momentum if role == "head" else 0.0, 0 if role == "embedding" else 1, norm, norm_eps)


class ScaleRule(MomentumRule):
    """The gradient, or its mean with `momentum`, each row (`axis` 1) or column (`axis` 0) divided by its size."""

    name = "scale"
    masks = True

    def __init__(self, momentum: float = 0.0, axis: int = 1, norm: str = "rms", norm_eps: float = 1e-8):
        super().__init__(momentum, nesterov=False)
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self._axis, self._of_mean, self._eps = axis, norm == "rms", norm_eps

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        batches = Batches(updates)
        made = yield from together(
            [
                over_lengths(batch, self._axis, self.followed, partial(self._size, batch.shard.shape[self._axis]))
                for batch in batches
            ]
        )
        for batch, direction in zip(batches, made, strict=True):
            batches.answer(batch, direction, batch.updates[0].rate)
        return batches.directions()

    def _size(self, count: int, norms: Tensor) -> Tensor:
        """Of rows or columns of `count` numbers with these norms."""
        return (norms / math.sqrt(count) if self._of_mean else norms).clamp(min=self._eps)


class Scale(MatrixOptimizer):
    """SCALE for other loops: `params` that are matrices have the given role, vectors AdamW; `from_model` knows which is
    the head and which the embedding.

    >>> import torch
    >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "mlp": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9)})
    >>> optimizer = Scale.from_model(model, lr=1e-3, adam_lr=0.02)
    >>> [(*group["param_names"], group["rule"], group["lr"]) for group in optimizer.param_groups]  # doctest: +ELLIPSIS
    [('mlp.bias', 'lm_head.bias', 'adamw', 0.02), ('embed.weight', 'scale', 0.001), ('lm_head.weight', 'scale', ...]
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        role: str = "hidden",
        momentum: float = 0.9,
        norm: str = "rms",
        norm_eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **settings: Any,
    ):
        matrices = {"rule": rule_for(role, momentum, norm, norm_eps)}
        super().__init__(params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)

    @classmethod
    def from_model(cls, model: nn.Module, *, target_modules: Sequence[str] = TARGET_MODULES, **settings: Any) -> Self:
        *others, matrices = model_groups(model, target_modules, {})
        roles = roles_of(model, [name for name, _ in matrices["params"]])
        own = {key: settings[key] for key in ("momentum", "norm", "norm_eps") if key in settings}
        groups = []
        for role in (None, "embedding", "head"):
            of_role = [each for group in others for each in group["params"] if _table(roles[each[0]]) == role]
            if of_role:
                groups.append({"params": of_role, "rule": "adamw" if role is None else rule_for(role, **own)})
        return cls([*groups, matrices], **settings)


def _table(role: str) -> str | None:
    return role if role in ("head", "embedding") else None
