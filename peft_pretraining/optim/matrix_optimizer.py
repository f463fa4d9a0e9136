"""The optimizer of methods that treat matrices in a way of their own: for loops other than this package's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from peft_pretraining.optim.low_rank import LowRankOptimizer
from peft_pretraining.optim.model_groups import TARGET_MODULES, model_groups


class MatrixOptimizer(LowRankOptimizer):
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
        formats, adamw = {"state_format": state_format, "rounding": rounding}, "adamw"
        if state_format == "8bit" and "rule" not in matrices:  # which rules of their own refuse
            formats["state_format"], adamw = "float32", "adamw8bit"
            settings = {"rule": adamw, **settings}
        groups = [part for group in as_groups(params) for part in _split(group, matrices, adamw)]
        own = {"lr": adam_lr, "betas": settings.get("betas")}  # a group that names its rule has not the optimizer's
        own = {name: value for name, value in own.items() if value is not None}
        groups = [{**own, **group} if group.get("rule") in ("adamw", adamw) else group for group in groups]
        super().__init__([{**formats, **group} for group in groups], **settings)

    @classmethod
    def from_model(cls, model: nn.Module, *, target_modules: Sequence[str] = TARGET_MODULES, **settings: Any) -> Self:
        """The optimizer of a model: `target_modules` are parts of the dotted names of the linear layers whose weights
        are the matrices, `settings` the constructor's. Raises `ValueError` if no layer has such a name."""
        *others, matrices = model_groups(model, target_modules, {})
        return cls([*({**group, "rule": "adamw"} for group in others), matrices], **settings)


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """What an optimizer is given, as groups."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or groups, got a tensor")
    given = list(params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]


def _split(group: Mapping[str, Any], matrices: Mapping[str, Any], adamw: str) -> list[dict[str, Any]]:
    """A group as it is, or its matrices with their settings and the rest of it, which has the rule `adamw`."""
    if "rule" in group:
        return [{**group, "rule": adamw} if group["rule"] == "adamw" else dict(group)]
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    of_method = [each for each in params if _tensor(each).ndim == 2]
    rest = [each for each in params if _tensor(each).ndim != 2]
    parts = []
    if of_method or not rest:
        parts.append({**matrices, **group, "params": of_method})
    if rest:
        parts.append({**group, "params": rest, "rule": adamw})
    return parts


def _tensor(param: Any) -> Tensor:
    found: Tensor = param[1] if isinstance(param, tuple) else param
    return found
