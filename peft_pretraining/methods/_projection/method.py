"""What the methods that project gradients share: GaLore, GoLore and Online Subspace Descent differ in the basis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_pretraining.distributed.process_group import as_it_is
from peft_pretraining.distributed.sharding import HALF, ShardInfo
from peft_pretraining.methods._low_rank.targets import named_by_flag
from peft_pretraining.methods._projection.settings import ONLINE_TYPES
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.methods.groups import by_role, state_settings
from peft_pretraining.models.targets import target_linears
from peft_pretraining.nn.projected_linear import project_backward
from peft_pretraining.optim import LowRankOptimizer, PerLayerUpdates
from peft_pretraining.optim.gradient_sums import sum_bytes
from peft_pretraining.optim.tensors.projection import LEFT, SIDES, projected_sides

if TYPE_CHECKING:
    from peft_pretraining.config import Config
    from peft_pretraining.methods._projection.settings import PerLayerSettings

log = logging.getLogger("peft_pretraining")

AS_PUBLISHED = ("published", "nearest")
"""State format and rounding of runs in which everything is in the weight's dtype."""


class GradientProjection(TrainingMethod[LowRankOptimizer]):
    """A `LowRankOptimizer` over the target layers, stepped by the loop or inside the backward pass."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._updates: PerLayerUpdates | None = None

    def projection(self) -> dict[str, Any]:
        """Settings of the projected parameter group: where its bases come from."""
        method = self.config.method
        return {
            **state_settings(self.config),
            "rank": method.rank,
            "update_proj_gap": method.update_proj_gap,
            "scale": method.scale,
            "proj_type": method.proj_type,
            "stagger_refresh": bool(getattr(method, "stagger_refresh", False)),
        }

    def table(self, role: str) -> dict[str, Any]:
        """Settings of the head, or of the embedding, where it is updated as the matrices are."""
        return self.projection()

    def build_optimizer(self, model: nn.Module) -> LowRankOptimizer:
        method, settings = self.config.method, self.config.optimizer
        with named_by_flag(self.config):
            targets = {f"{name}.weight" for name in target_linears(model, method.target_modules)}
        named = list(model.named_parameters())
        others = {"params": [each for each in named if each[0] not in targets]}
        return LowRankOptimizer(
            [
                *by_role(self.config, model, others, targets, method=self.table),
                {"params": [each for each in named if each[0] in targets], **self.projection()},
            ],
            rule=settings.optimizer,
            lr=settings.lr,
            **self.config.rule.arguments(),
            weight_decay=settings.weight_decay,
            svd_method=getattr(method, "svd_method", "gram"),
            seed=self.config.run.seed,
            full_norm=_clips_whole(method),
            refresh_accumulation=getattr(method, "refresh_accumulation", 1),
        )

    def sharded_dimension(self, name: str, param: Tensor) -> int:
        """Along the side that is not projected, R needs no communication."""
        targets = self.config.method.target_modules
        if param.ndim != 2 or not any(target in name.removesuffix(".weight") for target in targets):
            return 0
        proj_type = self.config.method.proj_type
        return 1 if projected_sides(proj_type if proj_type in SIDES else "std", param.shape) == (LEFT,) else 0

    def prepare(self, model: nn.Module, optimizer: LowRankOptimizer, reduce: Callable[[Tensor], Tensor]) -> None:
        asked_for = getattr(self.config.method, "clip_norm", None) == "full"
        if asked_for and self.config.distributed.reduce_low_rank is not False:
            log.info("--clip_norm full needs whole gradients: they are reduced as a whole")
        if getattr(self.config.method, "projected_backward", "off") == "on":
            for reason, names in by_reason(project_backward(model, optimizer, reduce)).items():
                log.info("the gradient of %s is formed in full, %s: %s", len(names), reason, ", ".join(names))
        if not self.config.method.per_layer:
            return
        method, clip = self.config.method, self.config.optimizer.clip_grad_norm
        if any(ShardInfo.of(param).dim is not None for param in model.parameters()):
            reduce = as_it_is  # FSDP2's gradients arrive reduced
        elif any((group["state_format"], group["rounding"]) != AS_PUBLISHED for group in optimizer.param_groups):
            reduce = _in_float32(reduce)
        self._updates = PerLayerUpdates(
            optimizer,
            reduce,
            clip=clip,
            clip_full=clip > 0 and _clips_whole(method),
            early_first_bases=bool(getattr(method, "stagger_refresh", False)),
            sum_dtype=self.config.precision.gradient_sum_dtype,
            seed=self.config.run.seed,
        )
        log_per_layer_updates(optimizer, self.config)


def by_reason(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by what is said of them."""
    found: dict[str, list[str]] = {}
    for name, reason in names.items():
        found.setdefault(reason, []).append(name)
    return found


def _clips_whole(method: Any) -> bool:
    """Whether gradients are clipped by the norm of whole ones: methods that read them have no choice."""
    return bool(getattr(method, "clip_norm", "full") == "full")


def _in_float32(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Averages 16-bit gradients in float32, as DDP does beside them (distributed/wide_sums.py), in place."""
    if reduce is as_it_is:
        return reduce

    def averaged(tensor: Tensor) -> Tensor:
        return tensor.copy_(reduce(tensor.float())) if tensor.dtype in HALF else reduce(tensor)

    return averaged


def log_per_layer_updates(optimizer: LowRankOptimizer, config: Config) -> None:
    """Say what is different, and how many bytes of gradients exist at a time."""
    method, clip, accumulation = config.method, config.optimizer.clip_grad_norm, config.batch.gradient_accumulation or 1
    log.info("per-layer updates: every parameter moves inside the backward pass")
    if clip:
        log.info("clipping: each parameter's gradient by its own norm, %g; no global norm exists in time", clip)
    online = getattr(method, "proj_type", "std") in ONLINE_TYPES
    if online and accumulation > 1:
        log.info("online PCA needs whole gradients: with %d micro-batches every layer adds up its own", accumulation)
    elif getattr(method, "stagger_refresh", False) and accumulation > 1:
        log.info("the first bases come from the first micro-batch of update 0")
    ordinary, refresh, whole = gradient_bytes(optimizer, method, accumulation, config.precision.gradient_sum_dtype)
    log.info(
        "gradients held at a time: about %.1f MB in ordinary updates, up to %.1f MB in those that refresh bases, "
        "%.1f MB without per-layer updates",
        *(ordinary / 1e6, refresh / 1e6, whole / 1e6),
    )


def gradient_bytes(
    optimizer: LowRankOptimizer, method: PerLayerSettings, accumulation: int, sum_dtype: str = "float32"
) -> tuple[int, int, int]:
    """The most bytes of gradients that exist at a time: in ordinary per-layer updates, in per-layer updates that
    refresh bases, and without per-layer updates."""
    subspaces = optimizer.subspaces
    params = [param for group in optimizer.param_groups for param in group["params"]]
    whole = sum(param.numel() * param.element_size() for param in params)
    largest = max(param.numel() * param.element_size() for param in params)
    formed = [param.numel() * param.element_size() for param in params if not _comes_as_r(optimizer, param)]
    returned = [leaf.numel() * leaf.element_size() for leaf in optimizer.leaves.values()]
    ordinary = max(formed + returned)
    if accumulation == 1:
        return ordinary, largest, whole
    kept = sum(param.numel() * param.element_size() for param in params if param not in subspaces)
    summed = [sum_bytes(param, param.numel(), sum_dtype, low_rank=False) for param in subspaces]
    low = sum(
        sum_bytes(param, space.projection.low_rank_shape(param.shape).numel(), sum_dtype)
        for param, space in subspaces.items()
    )
    if getattr(method, "proj_type", "std") in ONLINE_TYPES:
        return whole, whole, whole
    if _clips_whole(method):
        return kept + sum(summed) + largest, kept + sum(summed) + largest, whole
    gap = getattr(method, "update_proj_gap", 0) or len(summed)
    at_once = -(-len(summed) // gap) if getattr(method, "stagger_refresh", False) else len(summed)
    refreshed = sum(sorted(summed)[-at_once:])
    return kept + low + ordinary, kept + low + refreshed + largest, whole


def _comes_as_r(optimizer: LowRankOptimizer, param: Tensor) -> bool:
    """Whether a weight's layer forms a gradient of R's shape, but in updates that take a basis from it."""
    return optimizer.backward is not None and optimizer.backward.comes_from_here(param)
