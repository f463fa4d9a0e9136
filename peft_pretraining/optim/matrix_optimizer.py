"""The optimizer of methods that treat matrices in a way of their own: for loops other than this package's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from typing_extensions import Self

from peft_pretraining.optim.model_groups import TARGET_MODULES, model_groups
from peft_pretraining.optim.own_groups import OwnGroups, divided


class MatrixOptimizer(OwnGroups):
    """Updates matrices by the objects that a subclass gives, everything else by AdamW.

    `params` is what torch's optimizers take: parameters, named ones, or groups of these. Parameters with two dimensions
    are matrices; a group that names a `rule` of its own (`{"params": head, "rule": "adamw"}`) is left as it is.
    `from_model` takes the linear layers of attention and MLPs for the matrices, as pre-training does, and AdamW for
    embedding, head and norms.

    `matrices` are settings of the groups of matrices, `settings` those of `LowRankOptimizer`; `adam_lr` is the rate of
    what AdamW updates, by default that of the matrices. States and arithmetic are
    in float32 at least, and the weight is rounded once an update (`state_format`, `rounding`); `state_format="8bit"`
    keeps AdamW's moments in 8 bits, those of the matrices' projections with them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        matrices: Mapping[str, Any],
        adam_lr: float | None = None,
        state_format: str = "float32",
        rounding: str = "nearest",
        **settings: Any,
    ):
        formats, adamw = {"state_format": state_format, "rounding": rounding}, {"rule": "adamw"}
        if state_format == "8bit" and "rule" not in matrices:  # which rules of their own refuse
            formats["state_format"], adamw["rule"] = "float32", "adamw8bit"
            settings = {"rule": "adamw8bit", **settings}
        own = {"lr": adam_lr, "betas": settings.get("betas")}  # a group that names its rule has not the optimizer's
        own = {**adamw, **{name: value for name, value in own.items() if value is not None}}
        super().__init__(params, partial(_completed, dict(matrices), own, formats), **settings)

    @classmethod
    def from_model(cls, model: nn.Module, *, target_modules: Sequence[str] = TARGET_MODULES, **settings: Any) -> Self:
        """The optimizer of a model: `target_modules` are parts of the dotted names of the linear layers whose weights
        are the matrices, `settings` the constructor's. Raises `ValueError` if no layer has such a name."""
        *others, matrices = model_groups(model, target_modules, {})
        return cls([*({**group, "rule": "adamw"} for group in others), matrices], **settings)


def _completed(
    matrices: Mapping[str, Any], adamw: Mapping[str, Any], formats: Mapping[str, Any], group: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A group that names its rule, or its matrices with their settings and the rest of it."""
    if "rule" in group:
        is_adamws = group["rule"] in ("adamw", adamw["rule"])
        return [{**formats, **adamw, **group, "rule": adamw["rule"]} if is_adamws else {**formats, **group}]
    of_method, rest = divided(group, lambda param: param.ndim == 2)
    parts = []
    if of_method or not rest:
        parts.append({**formats, **matrices, **group, "params": of_method})
    if rest:
        parts.append({**formats, **adamw, **group, "params": rest})
    return parts
