"""What the methods with low-rank factors share: wrapping the layers, the parameter groups, the merged export."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pretraining import rng
from peft_pretraining.methods._factors.rank_sync import assert_equal_on_all_ranks
from peft_pretraining.methods._low_rank.targets import named_by_flag
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.methods.groups import by_role, state_settings
from peft_pretraining.models.targets import target_linears
from peft_pretraining.nn import LowRankLinear, low_rank_layers, merged_state_dict
from peft_pretraining.nn.initialization import draw_factors
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.rules.adamw import AdamW8bit
from peft_pretraining.optim.rules.columns import ColumnsAdamW8bit

log = logging.getLogger("peft_pretraining")


class FactorMethod(TrainingMethod[Any]):  # each has an optimizer of its own
    """Every target layer gets factors and a frozen weight; everything else trains as it is.

    `start` is the update at which the method's own time begins: 0, or where a warm start set in. It is the first update
    that the method sees, and is saved.
    """

    corrects_weights: bool = True
    """Whether frozen weights are changed again and again."""
    torch_epsilon: bool = True
    """Whether AdamW's ε stands where torch has it."""
    start: int | None = None
    _reduce: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)

    def replacements(self, model: nn.Module) -> dict[str, Callable[[nn.Linear], LowRankLinear]]:
        with named_by_flag(self.config):
            names = list(target_linears(model, self.config.method.target_modules))
        return {name: partial(self.wrap, index=index, name=name) for index, name in enumerate(names)}

    def wrap(self, linear: nn.Linear, index: int, name: str) -> LowRankLinear:
        """The layer that takes the place of `linear`, the `index`-th of the target layers."""
        settings = self.config.method
        layer = LowRankLinear(
            linear,
            settings.rank,
            self.scale,
            dropout=settings.lora_dropout,
            train_scaling=settings.train_scaling,
            corrected=self.corrects_weights,
            quantize=settings.quantize,
            double_quant=settings.use_double_quant,
        )
        generator = self.generator(index)
        a, b = draw_factors(layer, settings.init_lora_type, generator, settings.zero_init_B)
        layer.set_factors(a, b, keep_function=True)
        return layer

    def generator(self, index: int) -> torch.Generator:
        """That of the first factors of the `index`-th layer."""
        return rng.generator(self.config.run.seed, "factors", index=index)

    @property
    def scale(self) -> float:
        """s, which is the same for layers that are too small for the whole rank."""
        return float(self.config.method.lora_alpha / self.config.method.rank)

    @property
    def b_ratio(self) -> float:
        """The rate of B over that of A (LoRA+)."""
        return float(self.config.method.lora_plus_ratio)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All A, all B, and everything else that is trained, each with its own rate."""
        lr = self.config.optimizer.lr
        layers = low_rank_layers(model).values()
        all_a = [layer.lora_A for layer in layers if layer.lora_A.requires_grad]
        all_b = [layer.lora_B for layer in layers if layer.lora_B.requires_grad]
        in_factors = {*all_a, *all_b}
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        others = [(name, param) for name, param in trained if param not in in_factors]
        groups = []
        for factor, params, ratio in (("lora_A", all_a, 1.0), ("lora_B", all_b, self.b_ratio)):
            if params:
                own = {**state_settings(self.config), **self.own_settings(factor)}
                groups.append({**own, "params": params, "lr": lr * ratio, "initial_lr": lr * ratio})
        rate = lr * self.config.method.dense_lr_ratio
        dense = by_role(self.config, model, {"params": others, "lr": rate, "initial_lr": rate}, ())
        if rate != lr and self.config.roles.adam_lr is None and all(group["lr"] != rate for group in dense):
            log.warning("without effect, for all that has no factors has a rate of its own: --dense_lr_ratio")
        groups += [{**group, "params": [param for _, param in group["params"]]} for group in dense]
        return [group for group in groups if group["params"]]

    def own_settings(self, factor: str) -> dict[str, Any]:
        """What the parameter group of all `lora_A`, or of all `lora_B`, says for itself."""
        if factor == "lora_A" and self.config.optimizer.optimizer == "adamw8bit":  # A is sharded by columns
            return {"rule": ColumnsAdamW8bit(self.torch_epsilon)}
        return {}

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        in_8_bits = self.config.optimizer.optimizer == "adamw8bit"
        return LowRankOptimizer(
            self.parameter_groups(model),
            rule=AdamW8bit(self.torch_epsilon) if in_8_bits else "torch_adamw",
            lr=self.config.optimizer.lr,
            **self.config.rule.arguments(),
            weight_decay=self.config.optimizer.weight_decay,
            full_norm=True,
        )

    def sharded_dimension(self, name: str, param: Tensor) -> int | None:
        """W and B by rows, A by columns: merging and exporting gather A alone, and a row of A, like a column of B, has
        a part on every device."""
        return 1 if name.endswith(".lora_A") else 0

    def prepare(self, model: nn.Module, optimizer: Any, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce

    def own_time(self, step: int) -> int:
        """Updates since the method began."""
        if self.start is None:
            self.start = step
        return step - self.start

    def own_total(self) -> int:
        """Updates of the schedule from where the method began; known from its first update on."""
        return self.config.schedule.num_training_steps - (self.start or 0)

    def before_update(self, model: nn.Module, optimizer: Any, step: int) -> None:
        t = self.own_time(step)
        every = self.config.method.check_rank_sync
        if every and t % every == 0:
            assert_equal_on_all_ranks(low_rank_layers(model), self._reduce, step)

    def merged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return merged_state_dict(model)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]
