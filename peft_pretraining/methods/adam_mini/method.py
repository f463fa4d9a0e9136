"""Adam-mini: AdamW with one second moment for each block of a weight (arXiv 2406.16793).

    M <- β1 M + (1-β1) G                                                      (m, n)
    v <- β2 v + (1-β2) mean of G² over the block                              one number for each block
    W <- W (1 - lr weight_decay) - lr [M / (1-β1^k)] / [√(v / (1-β2^k)) + ε]

Blocks: an attention head of queries and keys; an output row of any other matrix, embedding and head included; a whole
vector, which has no weight decay. The authors' code takes as many entries for a head as it would have if heads were
hidden size / number of heads rows; here they are rows / number of heads, of keys the number of key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
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
from peft_pretraining.optim.own_groups import OwnGroups, divided
from peft_pretraining.optim.rules.batches import Maker, Part
from peft_pretraining.optim.tensors.collectives import in_turn
from peft_pretraining.optim.tensors.param_update import Quotient
from peft_pretraining.optim.tensors.state_tensor import zeros

BLOCKS = ("heads", "rows", "tensor")
_QUERIES, _KEYS = ("q_proj", "query"), ("k_proj", "key")
"""Last parts of the names of the layers whose outputs are heads."""


class AdamMiniTraining(TrainingMethod[LowRankOptimizer]):
    def build_optimizer(self, model: nn.Module) -> LowRankOptimizer:
        settings, own, undivided = self.config.optimizer, self.config.rule.arguments(), AdamMiniRule("tensor")
        everything = {"params": list(model.named_parameters()), "rule": undivided, "betas": own["betas"]}
        groups = []
        for group in by_role(self.config, model, everything, adamw="torch_adamw"):
            groups += [group] if group["rule"] is not undivided else by_blocks(model, group)
        return LowRankOptimizer(groups, lr=settings.lr, weight_decay=settings.weight_decay, full_norm=True, **own)


def by_blocks(model: nn.Module, group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of named parameters as one for each kind of blocks. Vectors have no decay unless the group says so."""
    kinds: dict[tuple[str, int | None], list[tuple[str, Tensor]]] = {}
    for name, param in group["params"]:
        kinds.setdefault(_blocks_of(model, name, param), []).append((name, param))
    groups = []
    for (blocks, heads), params in kinds.items():
        own = {"weight_decay": 0.0} if blocks == "tensor" else {}
        groups.append({**own, **group, "params": params, "rule": AdamMiniRule(blocks, heads)})
    return groups


def _blocks_of(model: nn.Module, name: str, param: Tensor) -> tuple[str, int | None]:
    """The kind of a parameter's blocks, and the number of heads, as far as the model's config tells it."""
    if param.ndim != 2:
        return "tensor", None
    config, layer = getattr(model, "config", None), name.split(".")[-2:-1]
    heads = None
    if layer and layer[0] in (*_QUERIES, *_KEYS):
        heads = getattr(config, "num_attention_heads", None)
        heads = (getattr(config, "num_key_value_heads", None) or heads) if layer[0] in _KEYS else heads
    return ("rows", None) if heads is None or param.shape[0] % heads else ("heads", heads)


class AdamMiniRule(UpdateRule):
    """AdamW whose second moments are of `heads` equal blocks of rows, of rows, or of the whole tensor.

    Blocks of devices that divide rows are local, but for heads and whole tensors, whose sums are added up: one
    collective for all parameters of a group.
    """

    masks = True
    decays_first = True
    betas = (0.9, 0.999)
    name = "adam_mini"

    def __init__(self, blocks: str = "rows", heads: int | None = None):
        if blocks not in BLOCKS:
            raise ValueError(f"blocks must be one of {', '.join(BLOCKS)}, got {blocks!r}")
        if blocks == "heads" and (heads is None or heads < 1):
            raise ValueError(f"heads must be a positive number with blocks 'heads', got {heads}")
        self._blocks, self._heads = blocks, heads or 1

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float((group["betas"] or self.betas)[0])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        rows = (shard.shape or like.shape)[0] if like.ndim else 1
        if self._blocks == "heads" and rows % self._heads:
            raise ValueError(f"heads must divide the {rows} rows of a parameter, got {self._heads}")
        if self._blocks == "rows":
            squares = StateTensor.along(like.new_zeros(like.shape[:1]), 0, shard)
        else:
            squares = StateTensor(like.new_zeros((self._heads,)))
        return {"exp_avg": StateTensor.like_gradient(zeros(like), shard), "block_mean_sq": squares}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        batches = Batches(updates)
        made = yield from in_turn([self._made(batch, group) for batch in batches], [batch.shard for batch in batches])
        for batch, direction in zip(batches, made, strict=True):
            factor = batch.updates[0].rate / (1 - (group["betas"] or self.betas)[0] ** batch.k)
            batches.answer(batch, direction, factor)
        return batches.directions()

    def _made(self, batch: Batch, group: dict[str, Any]) -> Phases[Maker]:
        """M / (√(v / (1-β2^k)) + ε), rows at a time."""
        beta1, beta2 = group["betas"] or self.betas
        shard = WHOLE if self._is_local(batch) else batch.shard
        (total,) = yield [Collective(self._sums(batch), shard)]
        mean_square = batch.state("block_mean_sq").lerp_(total / self._size(batch), 1 - beta2)
        root = self._spread((mean_square / (1 - beta2**batch.k)).sqrt_().add_(group["eps"]), batch)

        def of_rows(part: Part) -> Quotient:
            return Quotient(part.state("exp_avg").lerp_(part.grad, 1 - beta1), part.of(root))

        return of_rows

    def _is_local(self, batch: Batch) -> bool:
        """Whether this device has all entries of its blocks."""
        return batch.shard.dim is None or (self._blocks == "rows" and batch.shard.dim == 0)

    def _size(self, batch: Batch) -> int:
        """Entries of a block."""
        shape = batch.shard.shape or batch.shape
        return shape.numel() // (shape[0] if self._blocks == "rows" else self._heads)

    def _sums(self, batch: Batch) -> Tensor:
        """Sums of squares of this device's entries of each block, (..., blocks)."""
        grad, axes = batch.grad, batch.axes
        if self._blocks == "tensor":
            return (torch.linalg.vector_norm(grad, dim=axes) if axes else grad).square().unsqueeze(-1)
        of_rows = (torch.linalg.vector_norm(grad, dim=axes[1:]) if axes[1:] else grad).square()
        if self._blocks == "rows":
            return of_rows
        sums = of_rows.new_zeros(*of_rows.shape[:-1], self._heads)
        return sums.index_add_(-1, self._head_of_rows(batch), of_rows)

    def _head_of_rows(self, batch: Batch) -> Tensor:
        """The head of each row that this device has."""
        shard, rows = batch.shard, batch.shape[0]
        first = shard.offset if shard.dim == 0 else 0
        return torch.arange(first, first + rows, device=batch.grad.device) // (
            (shard.shape or batch.shape)[0] // self._heads
        )

    def _spread(self, blocks: Tensor, batch: Batch) -> Tensor:
        """Each block's number for its rows, to divide (..., m, n) by."""
        if self._blocks == "heads":
            blocks = blocks[..., self._head_of_rows(batch)]
        of_rows = blocks.shape[-1:] if batch.axes else ()
        return blocks.reshape((*blocks.shape[:-1], *of_rows, *(1 for _ in batch.axes[1:])))


class AdamMini(OwnGroups):
    """Adam-mini for other loops: `blocks` are those of matrices, each of `params` with rows; vectors are one block.
    `from_model` knows which layers have heads.

    >>> weight = nn.Parameter(torch.ones(4, 6))
    >>> optimizer = AdamMini([weight], lr=1e-3, blocks="heads", heads=2)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'exp_avg': (4, 6), 'block_mean_sq': (2,)}
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        blocks: str = "rows",
        heads: int | None = None,
        state_format: str = "float32",
        rounding: str = "nearest",
        **settings: Any,
    ):
        formats = {"state_format": state_format, "rounding": rounding, "betas": betas}
        complete = partial(_completed, formats, AdamMiniRule(blocks, heads), AdamMiniRule("tensor"))
        super().__init__(
            params, complete, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, full_norm=True, **settings
        )

    @classmethod
    def from_model(cls, model: nn.Module, **settings: Any) -> Self:
        """The optimizer of all parameters of a model that are trained; heads are those of `model.config`."""
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        return cls(by_blocks(model, {"params": trained}), **settings)


def _completed(
    formats: Mapping[str, Any], of_matrices: AdamMiniRule, of_vectors: AdamMiniRule, group: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A group that names its rule, or its matrices and its vectors."""
    if "rule" in group:
        return [{**formats, **group}]
    matrices, vectors = divided(group, lambda param: param.ndim >= 2)
    parts = []
    if matrices or not vectors:
        parts.append({**formats, **group, "params": matrices, "rule": of_matrices})
    if vectors:
        parts.append({**formats, "weight_decay": 0.0, **group, "params": vectors, "rule": of_vectors})
    return parts
