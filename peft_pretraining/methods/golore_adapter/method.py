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
from torch.utils.hooks import RemovableHandle

from peft_pretraining.distributed.sharding import total_norm
from peft_pretraining.methods._factors.method import FactorMethod
from peft_pretraining.nn import LowRankLinear
from peft_pretraining.nn.adapter_subspace import AdapterSubspace
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.backward_hooks import remove_all, weak_hook
from peft_pretraining.optim.basis.subspace import Subspace, draw_bases
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
            lean_refreshes=self._computes_in_bfloat16,
        )

    @property
    def _computes_in_bfloat16(self) -> bool:
        """Not of fine-tuning, which has no precision of its own: it keeps its bits on every device."""
        return self.config.resolved_precision().compute_dtype == "bfloat16"

    def prepare(self, model: nn.Module, optimizer: Any, reduce: Callable[[Tensor], Tensor]) -> None:
        super().prepare(model, optimizer, reduce)
        optimizer.reduce = reduce

    def acts_before_step(self, optimizer: AdapterOptimizer, step: int) -> bool:
        """In updates that refresh."""
        return optimizer.refreshes

    def before_step(self, model: nn.Module, optimizer: AdapterOptimizer, step: int) -> None:
        optimizer.take_bases()


class AdapterOptimizer(LowRankOptimizer):
    """Trains factors that are in the subspace already, and takes new bases from the full gradients of refreshes.

    `lean_refreshes`: layers keep less for the backward pass of a refresh, and where bases are drawn R adds up instead
    of G. Sums are in another order then: where products have more digits than bfloat16's, older runs go on with the
    bits they had.
    """

    def __init__(
        self,
        adapters: list[AdapterSubspace],
        scale: float,
        params: Any,
        *,
        lean_refreshes: bool = False,
        **settings: Any,
    ):
        super().__init__(params, **settings)
        self._lean_refreshes = lean_refreshes
        self._adapters, self._adapter_scale = adapters, float(scale)
        self._due_adapters: list[AdapterSubspace] = []
        self._to_observe = 0
        """Further total batches that are to come before the update's own."""
        self._hooks: list[RemovableHandle] = []
        self.reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
        """Averages a tensor over the ranks, in place."""
        for adapter in adapters:
            adapter.follow_sharding()
            self.state[adapter.trained] |= adapter.new_counters()

    def begin_update(self, step: int, frozen: bool = False) -> None:
        super().begin_update(step, frozen)
        remove_all(self._hooks)
        self._due_adapters = [each for each in self._adapters if each.is_due(self.state[each.trained], step)]
        for adapter in self._adapters:
            adapter.subspace.forget_observed()
            adapter.layer.lean_refresh = self._lean_refreshes and adapter.layer.scaling is None
            adapter.gather(False)
        if self._lean_refreshes:
            self._draw([each for each in self._due_adapters if not self._reads_gradient(each, step)], step)
        for adapter in self._due_adapters:
            if adapter.layer.gather_in is None:
                adapter.gather(True)
        self._to_observe = self.wants_extra_batches()

    @property
    def refreshes(self) -> bool:
        """Whether a basis changes in the update that has begun."""
        return bool(self._due_adapters)

    def _draw(self, adapters: list[AdapterSubspace], step: int) -> None:
        """New bases of refreshes that do not depend on the gradient: of these, R adds up alone."""
        drawn = [each for each in adapters if each.can_gather_low_rank]
        with torch.no_grad():
            found = draw_bases([each.arrival(self.local_state(each.trained), step) for each in drawn])
        for adapter, bases in zip(drawn, found, strict=True):
            if bases is not None:
                adapter.gather_low_rank(bases)

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Full gradients of the last micro-batch of an update that refreshes are used up layer by layer, inside its
        backward pass: one exists at a time, or, with more micro-batches, the sums of all that are due."""
        super().begin_micro_batch(index, count)
        remove_all(self._hooks)
        if index == count - 1 and not self._to_observe:
            for adapter in self._due_adapters:
                if adapter.gathers_whole:
                    hook = weak_hook(self._arrived)
                    self._hooks.append(adapter.trained.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _arrived(self, trained: Tensor) -> None:
        """A layer has had its part in the last backward pass."""
        (adapter,) = [each for each in self._due_adapters if each.trained is trained]
        if not adapter.gathers_whole:
            raise RuntimeError(
                f"update {self.update_step} has taken its basis of {adapter.subspace.name} already: call "
                "begin_micro_batch before every micro-batch"
            )
        self._choose_basis(adapter)

    def _choose_basis(self, adapter: AdapterSubspace) -> None:
        assert self.update_step is not None, "`begin_update` comes first"
        with torch.no_grad():
            adapter.reduce_gathered(self.reduce)
        adapter.choose_basis(self.local_state(adapter.trained), self.update_step)

    def wants_extra_batches(self) -> int:
        further, step = self.refresh_accumulation - 1, self.update_step
        return further if further and any(self._reads_gradient(each, step) for each in self._due_adapters) else 0

    @staticmethod
    def _reads_gradient(adapter: AdapterSubspace, step: int | None) -> bool:
        assert step is not None, "`begin_update` comes first"
        return adapter.subspace.rule.reads_gradient(step)

    def observe_gradients(self) -> None:
        self._to_observe -= 1
        for adapter in self._due_adapters:
            if adapter.gathers_whole:
                adapter.reduce_gathered(self.reduce)
                adapter.observe()

    def grad_norm(self) -> Tensor:
        """Norm over R of the adapted weights, in this update's basis, and over the full gradients of everything else.

        Chooses the new bases of a refresh where the backward pass has not: then full gradients are reduced here, in
        these updates alone.
        """
        remove_all(self._hooks)
        for adapter in self._due_adapters:
            if adapter.projected is None:
                self._choose_basis(adapter)
            adapter.give_gradient()
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
