"""GoLore in its adapter form: the weights are frozen, and a factor with a basis beside each holds only the update.

arXiv 2410.11289. The same mathematics as `golore`, run so that on ordinary updates no full gradient exists, neither in
memory nor in what the ranks exchange (nn/adapter_subspace.py). With equal bases, no clipping and no weight decay, the
effective weights follow those of `golore` with ε/s in place of ε for AdamW, and with the scale s² for SGD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed.sharding import total_norm
from peft_pretraining.methods._factors.method import FactorMethod
from peft_pretraining.methods._projection.method import summary
from peft_pretraining.nn import LowRankLinear
from peft_pretraining.nn.adapter_subspace import AdapterSubspace
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.projection import LEFT
from peft_pretraining.optim.subspace import Subspace

if TYPE_CHECKING:
    from peft_pretraining.config import Config


class GoLoreAdapter(FactorMethod):
    def __init__(self, config: Config):
        super().__init__(config)
        self.subspaces: list[AdapterSubspace] = []
        self._peers: list[Subspace] = []
        self._due: list[AdapterSubspace] = []
        self._refreshes: dict[str, list[Tensor]] = {}
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

    def sharded_dimension(self, name: str, param: Tensor) -> int:
        """W and its trained factor along the side that is not projected, so that R and merging need nothing else."""
        return 1 if name in self._by_columns else 0

    def is_replicated(self, name: str, param: Tensor) -> bool:
        """Bases are whole on every device."""
        return name in self._bases

    def build_optimizer(self, model: nn.Module) -> LowRankOptimizer:
        """The update rules of the optimizer form, without projection: the trained factors are in the subspace."""
        settings = self.config.optimizer
        optimizer = LowRankOptimizer(
            self.parameter_groups(model),
            rule=settings.optimizer,
            lr=settings.lr,
            **self.config.rule.arguments(),
            weight_decay=settings.weight_decay,
        )
        for adapter in self.subspaces:
            adapter.follow_sharding()
            optimizer.state[adapter.trained] |= adapter.new_counters()
        return optimizer

    def before_forward(self, model: nn.Module, optimizer: LowRankOptimizer, step: int) -> None:
        super().before_forward(model, optimizer, step)
        optimizer.begin_update(step)
        self._refreshes = {}
        self._due = [adapter for adapter in self.subspaces if adapter.is_due(optimizer.state[adapter.trained], step)]
        for adapter in self.subspaces:
            adapter.subspace.forget_observed()
            adapter.gather(adapter in self._due)

    def extra_batches(self, model: nn.Module, optimizer: LowRankOptimizer, step: int) -> int:
        further = self.config.method.refresh_accumulation - 1
        reads = any(adapter.subspace.rule.reads_gradient(step) for adapter in self._due)
        return further if further and reads else 0

    def observe_gradients(self, model: nn.Module, optimizer: LowRankOptimizer) -> None:
        for adapter in self._due:
            self._reduce_gradient(adapter)
            adapter.observe()

    def _reduce_gradient(self, adapter: AdapterSubspace) -> None:
        if adapter.layer.gradient_part is None:  # which has averaged it over the devices
            self._reduce(adapter.gathered_gradient)

    def grad_norm(self, model: nn.Module, optimizer: LowRankOptimizer) -> Tensor:
        """Norm over R of the adapted weights, in this update's basis, and over the full gradients of everything else.

        Chooses the new bases of a refresh: full gradients are reduced here, in these updates alone.
        """
        for adapter in self._due:
            self._reduce_gradient(adapter)
            assert optimizer.update_step is not None, "`before_forward` began the update"
            adapter.project(optimizer.local_state(adapter.trained), optimizer.update_step)
        trained = {adapter.trained: adapter.layer.scale for adapter in self.subspaces}
        gradients = [param.grad for param in model.parameters() if param.grad is not None and param not in trained]
        low_rank = total_norm(param.grad for param in trained if param.grad is not None)
        low_rank = low_rank / float(self.config.method.scale)  # the gradient of a trained factor is -s·R
        norm: Tensor = torch.linalg.vector_norm(torch.stack([low_rank, total_norm(gradients)]))
        return norm

    def before_optimizer_step(self, model: nn.Module, optimizer: LowRankOptimizer, step: int) -> None:
        for adapter in self._due:
            adapter.apply(optimizer.local_state(adapter.trained), step, optimizer.rule, self._refreshes)
        self._due = []

    def metrics(self) -> dict[str, float]:
        return summary(self._refreshes)


def projection_settings(config: Config) -> dict[str, Any]:
    """Where the bases come from: as the projected parameter group of the optimizer form has it."""
    method = config.method
    return {
        **{"rank": method.rank, "update_proj_gap": method.update_proj_gap, "proj_type": "std"},
        **{"stagger_refresh": bool(method.stagger_refresh), "svd_method": method.svd_method},
        **{"rand_ratio": method.rand_ratio, "num_training_steps": config.schedule.num_training_steps},
        "seed": config.run.seed,
    }
