"""Loading an optimizer's state into the tensors that exist, and refusing what does not fit before that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import local

if TYPE_CHECKING:
    from peft_pretraining.optim.state.base import InPlaceOptimizer

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of a parameter's name that come from what is around the model, and not from the model."""

_OTHER_STATE = "state of another rank, proj_type or rule"


class Loading:
    """One call of `load_state_dict`: `check` before torch replaces the groups, `put` after it."""

    def __init__(self, optimizer: InPlaceOptimizer) -> None:
        self.optimizer = optimizer
        self.own: dict[Tensor, dict[str, Any]] = {}
        self.saved: dict[Tensor, dict[str, Any]] = {}

    def check(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Refuse what does not fit, and give torch the groups in this optimizer's order, without the state."""
        optimizer = self.optimizer
        _check_form(state_dict)
        groups, own = state_dict["param_groups"], optimizer.param_groups
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
            return None  # which torch refuses
        groups = [_in_order(*pair) for pair in zip(groups, own, strict=True)]
        groups = [optimizer._as_called_now(group) for group in groups]
        keep = {*optimizer.defaults, "first_lr"}
        groups = [
            {**{key: value for key, value in ours.items() if key in keep and key not in saved}, **saved}
            for saved, ours in zip(groups, own, strict=True)
        ]
        states = dict(state_dict["state"])
        for saved, ours in zip(groups, own, strict=True):
            if saved.get("betas") is None and "betas" in ours:  # older states leave the rule's unsaid
                saved["betas"] = ours["betas"]
            optimizer._check_group(saved)
            optimizer._check_saved_group(saved, ours)
            for index, param in zip(saved["params"], ours["params"], strict=True):
                self.saved[param] = states.pop(index, {})
                _check_values(self.saved[param], param)
                _check_shapes(self.saved[param], optimizer.state[param], *optimizer._may_differ(param))
        self.own = {param: optimizer._follow(param) for param in self.saved}
        return {**state_dict, "state": states, "param_groups": groups}

    def put(self, _: torch.optim.Optimizer) -> None:
        """Copy the saved state into the tensors that were there."""
        with torch.no_grad():
            for param, saved in self.saved.items():
                own = self.own[param]
                adopted = saved.keys() - own.keys()
                for key in own.keys() - saved.keys():
                    del own[key]
                for key, value in saved.items():
                    if key in adopted or (own[key].dtype == torch.uint8) != (value.dtype == torch.uint8):
                        own[key] = value.to(param.device, copy=True)  # another form of the same moments
                    else:
                        local(own[key]).copy_(local(value))
                self.optimizer.state[param] = own
        self.optimizer._loaded()


def _bare(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _in_order(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A saved group with its parameters in this optimizer's order, where both have names."""
    if not saved.get("param_names") or not own.get("param_names"):
        return dict(saved)
    theirs, ours = ([_bare(name) for name in group["param_names"]] for group in (saved, own))
    if theirs == ours:  # names need not be unique then
        return dict(saved)
    if missing := set(ours) - set(theirs):
        unknown = sorted(set(theirs) - set(ours))
        raise ValueError(f"state of other parameters: {_few(unknown)} instead of {_few(sorted(missing))}")
    places = {name: place for place, name in enumerate(theirs)}
    order = [places[name] for name in ours]
    return {**saved, "params": [saved["params"][place] for place in order], "param_names": list(own["param_names"])}


def _few(names: list[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _check_form(state_dict: Any) -> None:
    """Raises `ValueError` for what no optimizer's `state_dict` returned."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("not the state of an optimizer: it has no `state` and `param_groups`")
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
        raise ValueError("not the state of an optimizer: `state` must map each parameter to its tensors")
    if not isinstance(groups, list) or not all(isinstance(g, dict) and "params" in g for g in groups):
        raise ValueError("not the state of an optimizer: `param_groups` must be a list of groups with `params`")


def _check_values(state: Mapping[str, Any], param: Tensor) -> None:
    """Raises `ValueError` for what cannot be copied into a tensor of the state: nothing must be half loaded."""
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the state's {key} must be a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_complex() or (value.is_meta and not param.is_meta):
            raise ValueError(f"the state's {key} cannot be loaded: {value.layout}, {value.dtype}, on {value.device}")
        if value.dtype == torch.uint8 and f"{key}_absmax" not in state:
            raise ValueError(f"the state's {key} has 8 bits, but no scales ({key}_absmax) beside it")


def _check_shapes(
    saved: dict[str, Any], own: dict[str, Any], may_lack: frozenset[str], may_add: frozenset[str]
) -> None:
    found, expected = ({key: tuple(value.shape) for key, value in state.items()} for state in (saved, own))
    compared = {key: shape for key, shape in found.items() if key in expected or key not in may_add}
    if compared != {key: shape for key, shape in expected.items() if key in found or key not in may_lack}:
        raise ValueError(f"{_OTHER_STATE}: {found} instead of {expected}")


def other_state(what: str, found: Any, expected: Any) -> ValueError:
    """The error for a saved state that another setting decided on."""
    return ValueError(f"{_OTHER_STATE}: {what} {found!r} instead of {expected!r}")
