"""FRUGAL: Adam on a part of the coordinates, sign descent on the rest (arXiv 2411.07837).

Every `update_proj_gap` updates a new part is chosen, and its moments begin anew (M = V = 0, k = 0). Then, k counting:

    inside:   W <- W - lr [M/(1-β1^k)] / [√(V/(1-β2^k)) + ε]
    outside:  W <- W - lr ρ sign(G), or G itself (`sgd`), or nothing (`none`)

The part is a share of the matrices (`blocks`), of each matrix's `columns` or `rows`, or the span of the top singular
vectors of its gradient (`svd`: Adam for R in GaLore's basis, and the sign of G - back(R) beside it). Which one depends
on seed, name and number of the choice alone, or, with `svd`, on the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_pretraining import rng
from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.methods._matrices.method import MatrixTraining, adam_arguments
from peft_pretraining.methods.frugal.settings import FREE_RULES, ORDERS, SPACES
from peft_pretraining.optim import Collective, Direction, MatrixOptimizer, ParamUpdate, Phases, StateTensor, UpdateRule
from peft_pretraining.optim.basis.svd import gram_eigenvectors, short_gram
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.param_update import ByRows
from peft_pretraining.optim.tensors.projection import LEFT, Projection
from peft_pretraining.optim.tensors.state_tensor import counter

MOMENTS = ("exp_avg", "exp_avg_sq")


class FrugalTraining(MatrixTraining):
    """`--frugal_space` says what the part consists of."""

    def matrices(self) -> dict[str, Any]:
        method = self.config.method
        rule = PartialAdam(
            method.frugal_space,
            method.frugal_density,
            method.update_proj_gap,
            method.frugal_free_rule,
            method.frugal_free_scale,
            method.frugal_blocks,
            seed=self.config.run.seed,
        )
        return {"rule": rule, **adam_arguments(self.config)}

    def sharded_dimension(self, name: str, param: Tensor) -> int:
        """One of which every device has its share of the part."""
        space = self.config.method.frugal_space
        if param.ndim != 2 or space in ("blocks", "columns"):
            return 0
        return 1 if space == "rows" or param.shape[0] < param.shape[1] else 0


class PartialAdam(UpdateRule):
    """Adam on the part that is chosen. `indices` are columns or rows to take instead of drawn ones, one set for each
    choice."""

    name = "frugal"

    decays_first = True
    betas = (0.9, 0.999)
    BASIS = "basis"

    def __init__(
        self,
        space: str = "blocks",
        density: float = 0.25,
        gap: int = 200,
        free_rule: str = "sign",
        free_scale: float = 1.0,
        order: str = "random",
        indices: Sequence[Tensor] = (),
        seed: int = 0,
    ):
        allowed = {"space": (space, SPACES), "free_rule": (free_rule, FREE_RULES), "blocks": (order, ORDERS)}
        for name, (value, known) in allowed.items():
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 < density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {density}")
        self._space, self._density, self._gap, self._order = space, density, gap, order
        self._free_rule, self._free_scale, self._indices, self._seed = free_rule, free_scale, indices, seed
        self.intermittent = frozenset(MOMENTS) if space == "blocks" else frozenset()

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float((group["betas"] or self.betas)[0])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        """`choice` is the number of the part in use, -1 before the first; `age` is k."""
        if like.ndim != 2:
            raise ValueError(f"FRUGAL is for matrices, got shape {tuple(like.shape)}")
        declared = {"choice": StateTensor(counter(-1)), "age": StateTensor(counter(0))}
        if self._space == "svd":
            projection = self._projection((shard.shape and shard) or ShardInfo(like.shape))
            (basis,) = projection.new_bases(like).values()
            declared[self.BASIS] = StateTensor(basis)
            shape, divided = projection.low_rank_shape(like.shape), projection.low_rank_shard
        else:
            shape, divided = self._shape_of_part(like.shape), shard
        self._check_division(shard, like.shape)
        return declared | {key: StateTensor.like_gradient(like.new_zeros(shape), divided) for key in MOMENTS}

    def _check_division(self, shard: ShardInfo, shape: torch.Size) -> None:
        chosen = {"columns": 1, "rows": 0}.get(self._space)
        if self._space == "svd":
            chosen = 1 if (shard.shape or shape)[0] >= (shard.shape or shape)[1] else 0
        if shard.dim is not None and shard.dim == chosen:
            raise ValueError(
                f"space {self._space!r} cannot go with matrices divided over devices by dimension {chosen}"
            )

    def _shape_of_part(self, shape: torch.Size) -> torch.Size:
        rows, columns = shape
        if self._space == "columns":
            columns = int(self._density * columns)
        elif self._space == "rows":
            rows = int(self._density * rows)
        return torch.Size((rows, columns))

    def _projection(self, shard: ShardInfo) -> Projection:
        """Of the space svd: GaLore's."""
        return Projection.for_weight("std", max(1, round(self._density * min(shard.shape))), shard)

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> Phases[list[Direction | None]]:
        due = [update for update in updates if int(update.state["choice"]) != self._choice(update)]
        if self._space == "svd":
            yield from self._decompose(due)
        for update in due:
            self._begin_anew(update, len(group["params"]))
        found: list[Direction | None] = []
        for update in updates:
            update.state["age"] += 1
            made = self._made_whole if launches_cost(update.weight.device) else self._made_by_rows
            found.append(made(update, group))
        return found

    def _made_whole(self, update: ParamUpdate, group: dict[str, Any]) -> Direction:
        return Direction(self._direction(update, group), update.rate)

    def _made_by_rows(self, update: ParamUpdate, group: dict[str, Any]) -> Direction:
        """On the CPU, some rows at a time while the weight moves: a new tensor of a large matrix costs more than what
        is computed."""
        if self._space != "blocks":
            return self._made_whole(update, group)

        def rows_of(rows: slice | None) -> Tensor:
            return self._direction(update, group) if rows is None else self._whole_matrix(update, group, rows)

        return ByRows.of(rows_of, update.low_rank_grad, update.rate, 1.0)

    def _choice(self, update: ParamUpdate) -> int:
        """The number of the part that is due: one that fell on an update which was skipped is made in the next."""
        return update.step // self._gap if self._gap else 0

    def _decompose(self, due: Sequence[ParamUpdate]) -> Phases[None]:
        """New bases of the space svd."""
        projections = [self._projection(update.shard) for update in due]
        grams = yield [
            Collective(short_gram(update.low_rank_grad, projection.sides[0]), update.shard)
            for update, projection in zip(due, projections, strict=True)
        ]
        for update, projection, gram in zip(due, projections, grams, strict=True):
            (side,), basis = projection.sides, update.state[self.BASIS]
            basis.copy_(gram_eigenvectors(gram, projection.rank, side, basis.dtype)[side])

    def _begin_anew(self, update: ParamUpdate, count: int) -> None:
        """The first update of a part; the moments of whole matrices come and go with it."""
        state, choice = update.state, self._choice(update)
        inside = self._space != "blocks" or update.index in self._blocks(choice, count)
        for key in MOMENTS:
            if not inside:
                state.pop(key, None)
            elif key in state:
                state[key].zero_()
            else:
                state[key] = torch.zeros_like(update.low_rank_grad)
        state["age"].zero_()
        state["choice"].fill_(choice)

    def _blocks(self, choice: int, count: int) -> set[int]:
        """Places in the group of the matrices that are inside."""
        size = round(self._density * count)
        if self._order == "descending":
            return {(count - 1 - choice * size - place) % count for place in range(size)}
        drawn = torch.randperm(count, generator=rng.generator(self._seed, "matrices inside", choice))
        return set(drawn[:size].tolist())

    def _index(self, update: ParamUpdate) -> Tensor:
        """Columns or rows that are inside."""
        choice, dim = int(update.state["choice"]), 1 if self._space == "columns" else 0
        if self._indices:
            return self._indices[choice].to(update.weight.device)
        draws = rng.generator(self._seed, f"{self._space} inside of {update.name}", choice)
        length = (update.shard.shape or update.weight.shape)[dim]
        return torch.randperm(length, generator=draws)[: int(self._density * length)].to(update.weight.device)

    def _direction(self, update: ParamUpdate, group: dict[str, Any]) -> Tensor:
        grad, adam = update.low_rank_grad, partial(self._adam, update, group)
        if self._space == "blocks":
            return self._whole_matrix(update, group, slice(None))
        if self._space == "svd":
            projection = replace(self._projection(update.shard), shard=update.shard)
            bases = {projection.sides[0]: update.state[self.BASIS]}
            low_rank = projection.project(bases, grad)
            found = self._free(_outside(grad, projection.project_back(bases, low_rank), projection))
            projection.add_projected_back(found, bases, adam(low_rank), 1.0)
            return found
        index, dim = self._index(update), 1 if self._space == "columns" else 0
        return self._free(grad).index_copy_(dim, index, adam(grad.index_select(dim, index)))

    def _whole_matrix(self, update: ParamUpdate, group: dict[str, Any], rows: slice) -> Tensor:
        """These rows of D, where a matrix is inside or outside as a whole."""
        grad = update.low_rank_grad[rows]
        return self._adam(update, group, grad, rows) if MOMENTS[0] in update.state else self._free(grad)

    def _free(self, grad: Tensor) -> Tensor:
        """A new tensor: how coordinates move that are outside."""
        if self._free_rule == "none":
            return torch.zeros_like(grad)
        found = grad.sign() if self._free_rule == "sign" else grad.clone()
        return found if self._free_scale == 1 else found.mul_(self._free_scale)

    def _adam(self, update: ParamUpdate, group: dict[str, Any], grad: Tensor, rows: slice = slice(None)) -> Tensor:
        (beta1, beta2), k = group["betas"], int(update.state["age"])
        first, second = (update.state[key][rows] for key in MOMENTS)
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (second / (1 - beta2**k)).sqrt_().add_(group["eps"])
        found: Tensor = (first / (1 - beta1**k)).div_(root)
        return found


def _outside(grad: Tensor, inside: Tensor, projection: Projection) -> Tensor:
    """G - back(R), with zeros for what is rounding alone, whose sign would be a step like any other."""
    if projection.rank == min(projection.shard.shape or grad.shape):
        return torch.zeros_like(grad)  # all is inside
    axis = 0 if projection.sides == (LEFT,) else 1
    rounding = 4 * torch.finfo(grad.dtype).eps + 16 * torch.finfo(torch.float64).eps  # of products, and of the basis
    left = grad - inside
    return left.masked_fill_(left.abs() <= rounding * torch.linalg.vector_norm(grad, dim=axis, keepdim=True), 0.0)


class Frugal(MatrixOptimizer):
    """FRUGAL for other loops: matrices as above, everything else by AdamW at the same rate.

    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = Frugal([weight], lr=0.001, space="columns", density=0.5)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'exp_avg': (6, 2), 'exp_avg_sq': (6, 2)}

    `indices` are columns or rows to take instead of drawn ones, one set for each choice: for tests.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        space: str = "blocks",
        density: float = 0.25,
        update_proj_gap: int = 200,
        free_rule: str = "sign",
        free_scale: float = 1.0,
        blocks: str = "random",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        indices: Sequence[Tensor] = (),
        **settings: Any,
    ):
        rule = PartialAdam(space, density, update_proj_gap, free_rule, free_scale, blocks, indices, seed)
        matrices = {"rule": rule, "betas": betas}
        super().__init__(
            params, matrices=matrices, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, seed=seed, **settings
        )
