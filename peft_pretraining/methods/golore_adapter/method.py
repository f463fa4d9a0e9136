"""GoLore in its adapter form: the weights are frozen, and a factor with a basis beside each holds only the update.

arXiv 2410.11289. The same mathematics as `golore`, run so that on ordinary updates no full gradient exists, neither in
memory nor in what the ranks exchange (nn/adapter_subspace.py). With equal bases, no clipping and no weight decay, the
effective weights follow those of `golore` with ε/s in place of ε for AdamW, and with the scale s² for SGD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import total_norm
from peft_pretraining.methods._factors.method import FactorMethod
from peft_pretraining.nn import LowRankLinear
from peft_pretraining.nn.adapter_subspace import AdapterSubspace
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.basis.subspace import Subspace
from peft_pretraining.optim.tensors.projection import LEFT

if TYPE_CHECKING:
    from peft_pretraining.config import Config


class GoLoreAdapter(FactorMethod):
    torch_epsilon = False

    def __init__(self, config: Config):
        super().__init__(config)
        self.subspaces: list[AdapterSubspace] = []
        self._peers: list[Subspace] = []
        self._by_columns: set[str] = set()
        self._bases: set[str] = set()

    @property
    def scale(self) -> float:
        return -float(self.config.method.scale)

    @property
    def b_ratio(self) -> float:
        """Which of the two factors is trained depends on a layer's shape, and means nothing: one rate for all."""
        return 1.0

    def wrap(self, linear: nn.Linear, index: int, name: str) -> LowRankLinear:
        """Both factors are zero: the first refresh makes the basis."""
        rank, dropout = self.config.method.rank, self.config.method.lora_dropout
        layer = LowRankLinear(linear, rank, self.scale, dropout=dropout, corrected=True)
        adapter = AdapterSubspace(layer, name, projection_settings(self.config), self._peers)
        self.subspaces.append(adapter)
        if adapter.side == LEFT:
            self._by_columns |= {f"{name}.weight", f"{name}.lora_A"}
        self._bases.add(f"{name}.lora_B" if adapter.side == LEFT else f"{name}.lora_A")
        return layer

    def sharded_dimension(self, name: str, param: Tensor) -> int | None:
        """W and its trained factor along the side that is not projected, so that R and merging need nothing else; every
        device has the whole basis."""
        if name in self._bases:
            return None
        return 1 if name in self._by_columns else 0

    def build_optimizer(self, model: nn.Module) -> AdapterOptimizer:
        """The update rules of the optimizer form, without projection: the trained factors are in the subspace."""
        settings = self.config.optimizer
        return AdapterOptimizer(
            self.subspaces,
            self.config.method.scale,
            self.parameter_groups(model),
            rule=settings.optimizer,
            lr=settings.lr,
            **self.config.rule.arguments(),
            weight_decay=settings.weight_decay,
            refresh_accumulation=self.config.method.refresh_accumulation,
        )

    def prepare(self, model: nn.Module, optimizer: Any, reduce: Callable[[Tensor], Tensor]) -> None:
        super().prepare(model, optimizer, reduce)
        optimizer.reduce = reduce

    def before_step(self, model: nn.Module, optimizer: AdapterOptimizer, step: int) -> None:
        optimizer.take_bases()


class AdapterOptimizer(LowRankOptimizer):
    """Trains factors that are in the subspace already, and takes new bases from the full gradients of refreshes."""

    def __init__(self, adapters: list[AdapterSubspace], scale: float, params: Any, **settings: Any):
        super().__init__(params, **settings)
        self._adapters, self._adapter_scale = adapters, float(scale)
        self._due_adapters: list[AdapterSubspace] = []
        self.reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
        """Averages a tensor over the ranks, in place."""
        for adapter in adapters:
            adapter.follow_sharding()
            self.state[adapter.trained] |= adapter.new_counters()

    def begin_update(self, step: int, frozen: bool = False) -> None:
        super().begin_update(step, frozen)
        self._due_adapters = [each for each in self._adapters if each.is_due(self.state[each.trained], step)]
        for adapter in self._adapters:
            adapter.subspace.forget_observed()
            adapter.gather(adapter in self._due_adapters)

    def wants_extra_batches(self) -> int:
        further, step = self.refresh_accumulation - 1, self.update_step
        return further if further and any(self._reads_gradient(each, step) for each in self._due_adapters) else 0

    @staticmethod
    def _reads_gradient(adapter: AdapterSubspace, step: int | None) -> bool:
        assert step is not None, "`begin_update` comes first"
        return adapter.subspace.rule.reads_gradient(step)

    def observe_gradients(self) -> None:
        for adapter in self._due_adapters:
            self._reduce_gradient(adapter)
            adapter.observe()

    def _reduce_gradient(self, adapter: AdapterSubspace) -> None:
        if adapter.layer.gradient_part is None:  # which has averaged it over the devices
            self.reduce(adapter.gathered_gradient)

    def grad_norm(self) -> Tensor:
        """Norm over R of the adapted weights, in this update's basis, and over the full gradients of everything else.

        Chooses the new bases of a refresh: full gradients are reduced here, in these updates alone.
        """
        for adapter in self._due_adapters:
            self._reduce_gradient(adapter)
            assert self.update_step is not None, "`begin_update` comes first"
            adapter.project(self.local_state(adapter.trained), self.update_step)
        trained = {adapter.trained for adapter in self._adapters}
        gradients = [param.grad for param in self.in_norm_order() if param.grad is not None and param not in trained]
        low_rank = total_norm(each.trained.grad for each in self._adapters if each.trained.grad is not None)
        low_rank = low_rank / self._adapter_scale  # the gradient of a trained factor is -s·R
        norm: Tensor = torch.linalg.vector_norm(torch.stack([low_rank, total_norm(gradients)]))
        return norm

    def take_bases(self) -> None:
        """Before the step: the bases that `grad_norm` chose become those in use, and the weights take over the rest."""
        for adapter in self._due_adapters:
            assert self.update_step is not None, "`begin_update` comes first"
            adapter.apply(self.local_state(adapter.trained), self.update_step, self.rule, self.refresh_metrics)
        self._due_adapters = []


def projection_settings(config: Config) -> dict[str, Any]:
    """Where the bases come from: as the projected parameter group of the optimizer form has it."""
    method = config.method
    return {
        **{"rank": method.rank, "update_proj_gap": method.update_proj_gap, "proj_type": "std"},
        **{"stagger_refresh": bool(method.stagger_refresh), "svd_method": method.svd_method},
        **{"rand_ratio": method.rand_ratio, "num_training_steps": config.schedule.num_training_steps},
        "seed": config.run.seed,
    }
