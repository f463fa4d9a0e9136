"""GoLore's adapter form for one layer: a frozen basis as one factor, the projected update as the other.

arXiv 2410.11289, in the form x Wᵀ - s·(x Bᵀ) Aᵀ of its public code, whose B (r, n) and A (m, r) are `lora_A` and
`lora_B` here, with the scale -s. For m >= n `lora_A` is the basis Q and `lora_B` is trained; otherwise `lora_B` is the
basis P and `lora_A` is trained. On ordinary updates the trained factor's gradient is -s·G Qᵀ (or -s·Pᵀ G), and neither
G nor anything of its size exists.

A refresh gathers G through the frozen weight, or R alone for a basis that was drawn before. Then W ← W - s·A·B, the
basis changes, the first moment is carried over, and the trained factor begins at zero with the gradient -s·G Qᵀ in the
new basis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.gathering import copy_to_shard, mean_part
from peft_pretraining.distributed.sharding import ShardInfo, local
from peft_pretraining.nn.low_rank_linear import LowRankLinear, working_dtype
from peft_pretraining.optim.basis.bases import basis_rule
from peft_pretraining.optim.basis.subspace import Arrival, Projected, Subspace
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.projection import RIGHT, Bases
from peft_pretraining.optim.tensors.state_tensor import counter


class AdapterSubspace:
    """The subspace of one layer, whose basis is a factor of the layer.

    `settings`: rank, proj_type, update_proj_gap, stagger_refresh, rand_ratio, num_training_steps, svd_method, seed, as
    in the projected group of a `LowRankOptimizer`. `state` is what the optimizer holds for the trained factor, with the
    counters of `new_counters` in it.
    """

    def __init__(self, layer: LowRankLinear, name: str, settings: dict[str, Any], peers: list[Subspace]):
        self.layer, self.settings = layer, settings
        shape, rule = torch.Size((layer.out_features, layer.in_features)), basis_rule(settings)
        self.subspace = Subspace(rule, rule.projection(settings, shape), f"{name}.weight", peers)
        (self.side,) = self.subspace.projection.sides
        self.projected: Projected | None = None
        self.basis.requires_grad_(False)  # for good, so that nothing that wraps the model sees it change

    @property
    def basis(self) -> nn.Parameter:
        return self.layer.lora_A if self.side == RIGHT else self.layer.lora_B

    @property
    def trained(self) -> nn.Parameter:
        return self.layer.lora_B if self.side == RIGHT else self.layer.lora_A

    @staticmethod
    def new_counters() -> dict[str, Tensor]:
        """Update step of the last refresh (-1: none) and their number."""
        return {"last_refresh": counter(-1), "refreshes": counter(0)}

    def follow_sharding(self) -> None:
        """The model has been sharded over devices: from now on gradients and R are this device's parts.

        Sums over devices, where a basis needs them, are the basis rule's.
        """
        weight, dtype = self.layer.frozen_weight, working_dtype(self.layer.lora_A.dtype)
        self.subspace.projection = self.subspace.rule.projection(self.settings, ShardInfo.of(weight))
        if ShardInfo.of(weight).dim is not None:
            # At once, in every backward pass: the gradient of a whole layer exists for that moment only.
            self.layer.gradient_part = lambda gradient: mean_part(gradient.to(dtype), weight)

    @property
    def _sharded_rank(self) -> ShardInfo | None:
        """How the trained factor is sharded where R, in contrast, is whole on every device: along the rank, since the
        other dimension could not be sharded evenly."""
        shard = ShardInfo.of(self.trained)
        return shard if shard.dim is not None and self.subspace.projection.low_rank_shard.dim is None else None

    def is_due(self, state: dict[str, Tensor], step: int) -> bool:
        return self.subspace.refresh_is_due(state, self.settings, step)

    def gather(self, wanted: bool) -> None:
        """Let the backward passes from now on add up the full gradient (m, n), in float32 at least, or not."""
        layer, self.projected = self.layer, None
        layer.full_gradient = layer.gather_in = None
        if wanted:
            self._begin(local(layer.frozen_weight).shape)

    def _begin(self, shape: torch.Size) -> None:
        """Zeros that take no memory before there is something to add."""
        weight = local(self.layer.frozen_weight)
        zero = torch.zeros((), dtype=working_dtype(self.layer.lora_A.dtype), device=weight.device)
        self.layer.full_gradient = zero.expand(shape)

    @property
    def can_gather_low_rank(self) -> bool:
        """Whether R adds up without G: not where devices share what is projected away."""
        return not self.subspace.projection.shards_projected_side

    def arrival(self, state: dict[str, Tensor], step: int) -> Arrival:
        """This layer in a refresh whose basis does not depend on the gradient: its shape says all."""
        self._begin(local(self.layer.frozen_weight).shape)
        return Arrival(self._ready(), self._with_basis(state), self.gathered_gradient, self.settings, step)

    def gather_low_rank(self, bases: Bases) -> None:
        """Let the backward passes from now on add up R in these bases, which will be those of the refresh."""
        self.layer.gather_in = bases
        self._begin(self.subspace.projection.low_rank_shape(local(self.layer.frozen_weight).shape))

    def _ready(self) -> Subspace:
        """The subspace, whose bases are in the dtype that the factor has now."""
        kept = self.basis.dtype
        self.subspace.projection = replace(self.subspace.projection, stored=kept, working=kept)
        return self.subspace

    @property
    def gathers_whole(self) -> bool:
        """Whether full gradients are being added up."""
        return self.layer.full_gradient is not None and self.layer.gather_in is None

    @property
    def gathered_gradient(self) -> Tensor:
        """The full gradient (m, n), or this device's part, that the backward passes have added up; R with a basis that
        was drawn before."""
        assert self.layer.full_gradient is not None, "it was not asked for"
        return self.layer.full_gradient

    def reduce_gathered(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average what was gathered over the ranks, in place, unless backward passes have."""
        if self.layer.gradient_part is None:
            self.layer.full_gradient = reduce(self.gathered_gradient.contiguous())

    @torch.no_grad()
    def observe(self) -> None:
        """Let the refresh see the gradient that was gathered, and begin gathering anew."""
        self.subspace.observe(self.gathered_gradient)
        self._begin(self.gathered_gradient.shape)

    @torch.no_grad()
    def project(self, state: dict[str, Tensor], step: int) -> None:
        """`choose_basis` and `give_gradient`."""
        self.choose_basis(state, step)
        self.give_gradient()

    @torch.no_grad()
    def choose_basis(self, state: dict[str, Tensor], step: int) -> None:
        """Choose the new basis for the full gradient, which is complete and reduced, and keep nothing of it but R.
        Nothing is committed: the update may still be skipped."""
        layer, gathered = self.layer, self.gathered_gradient
        if layer.gather_in is None:
            self.projected = self._ready().project(self._with_basis(state), gathered, self.settings, step)
        else:
            self.projected = Projected(gathered.to(self.basis.dtype), layer.gather_in)
        layer.full_gradient = layer.gather_in = None

    @torch.no_grad()
    def give_gradient(self) -> None:
        """Give the trained factor its gradient in the basis that was chosen."""
        assert self.projected is not None, "the new basis was not chosen"
        gradient, trained = self.projected.low_rank_grad.mul(self.layer.scale), self.trained.grad
        assert trained is not None, "every backward pass gives the trained factor a gradient"
        if self._sharded_rank is None:
            local(trained).copy_(gradient)
        else:
            copy_to_shard(trained, gradient)

    @torch.no_grad()
    def apply(self, state: dict[str, Tensor], step: int, rule: UpdateRule, metrics: dict[str, list[Tensor]]) -> None:
        """Merge what the old basis has gathered, change the basis, and begin at zero in it."""
        projected, self.projected = self.projected, None
        assert projected is not None, "the new basis was not chosen"
        if projected.new_bases is not None:
            self.layer.add_to_weight(self.layer.delta_weight())
            local(self.trained).zero_()
        state, sharded = self._with_basis(state), self._sharded_rank
        moment = state.get(rule.first_moment)
        if sharded is None or sharded.dim is None or moment is None:
            self.subspace.apply(state, projected, step, rule, metrics)
            return
        gathered = sharded.gather(moment)
        self.subspace.apply({**state, rule.first_moment: gathered}, projected, step, rule, metrics)
        moment.copy_(sharded.part(gathered, sharded.dim))

    def _with_basis(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's state and the basis, where `Subspace` looks for them; changes in place reach both."""
        return {**state, self.side: self.basis.detach()}
