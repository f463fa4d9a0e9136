"""What the package's optimizers share: whole or no groups, state that follows its weight, loading in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from peft_pretraining.distributed.sharding import local
from peft_pretraining.optim.state.gradient_owner import GradientOwner
from peft_pretraining.optim.state.saved_state import Loading
from peft_pretraining.optim.tensors.state_tensor import is_counter


class InPlaceOptimizer(GradientOwner, torch.optim.Optimizer):
    """An optimizer whose state exists from the start: a checkpoint loads into tensors that are there.

    Subclasses say what a group's state is (`_new_states`) and what must not be loaded (`_check_saved_group`). State
    lies on its weight's device, wherever that goes, but for counters; it keeps the dtype that it had at construction.
    """

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises `ValueError` for settings that are wrong in themselves."""

    def _new_states(self, group: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """The state of every parameter of a group. Raises, and leaves nothing behind, if one cannot be made."""
        raise NotImplementedError

    def _check_keys(self, given: Collection[str]) -> None:
        """Raises `ValueError` for settings that do not exist."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its state at once. A group that is refused leaves nothing behind."""
        if isinstance(param_group, dict):
            self._check_keys(param_group.keys())
            param_group = dict(param_group)  # torch fills it in
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for index, param in enumerate(group["params"]):
                if param.is_complex():
                    raise ValueError(f"a complex parameter cannot be trained: {name_of(group, index)}, {param.dtype}")
            self._check_group(group)
            states = self._new_states(group)
        except Exception:
            self.param_groups.pop()
            raise
        self.state.update(states)

    def group_of(self, param: Tensor) -> dict[str, Any]:
        """A parameter's group as it is now: loading a state puts new ones in place."""
        groups = self.param_groups
        known, size, found = self.__dict__.get("_groups_seen", ([], 0, {}))
        now = sum(len(group["params"]) for group in groups)
        if len(known) != len(groups) or size != now or any(a is not b for a, b in zip(known, groups, strict=True)):
            found = {param: group for group in groups for param in group["params"]}
            self.__dict__["_groups_seen"] = (list(groups), now, found)
        group: dict[str, Any] = found[param]
        return group

    def _follow(self, param: Tensor) -> dict[str, Any]:
        """A parameter's state, on the parameter's device: `model.to` may have moved it since."""
        state: dict[str, Any] = self.state[param]
        device = param.device
        for key, value in state.items():
            if value.device != device and not is_counter(value) and not isinstance(value, DTensor):
                state[key] = value.to(device)
        return state

    def local_state(self, param: Tensor) -> dict[str, Any]:
        """A parameter's state as this device has it, where the parameter is."""
        return {key: local(value) for key, value in self._follow(param).items()}

    def _has_gradient(self, param: Tensor) -> bool:
        """Whether a parameter's gradient is there, wherever it comes from."""
        return param.grad is not None

    def _with_gradients(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Parameters that have a gradient. Raises `RuntimeError`, before anything is done, for a sparse one."""
        found = [(p, group) for group in self.param_groups for p in group["params"] if self._has_gradient(p)]
        for param, _ in found:
            if param.grad is not None:
                check_dense(param, type(self).__name__)
        return iter(found)

    # Loading.

    def _as_called_now(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved group with the names that its settings have by now."""
        return saved

    def _check_saved_group(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        """Raises `ValueError` if a group's state would not fit into this one's."""

    def _may_differ(self, param: Tensor) -> tuple[frozenset[str], frozenset[str]]:
        """Keys that a saved state may lack, and keys that it may have beyond this optimizer's."""
        return frozenset(), frozenset()

    def _loaded(self) -> None:
        """State and groups have been replaced."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but into the tensors that exist: each keeps its dtype and its weight's device.

        Named parameters are matched by name. Raises `ValueError`, and loads nothing, for the state of other
        parameters, another rank, projection or rule, and for settings that the constructor would refuse.
        """
        loading = Loading(self)
        handles = (
            self.register_load_state_dict_pre_hook(loading.check),  # after the caller's hooks, which may change it
            self.register_load_state_dict_post_hook(loading.put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()


def name_of(group: dict[str, Any], index: int) -> str:
    """A parameter's name, or which one it is."""
    names = group.get("param_names")
    return names[index] if names else f"parameter {index} of its group"


def grad_of(param: Tensor) -> Tensor:
    """A parameter's gradient, which it has."""
    assert param.grad is not None
    return param.grad


def gradient_of(param: Tensor) -> Tensor:
    """This device's part of a parameter's gradient."""
    return local(grad_of(param))


def check_dense(param: Tensor, who: str) -> None:
    """Raises `RuntimeError` for a sparse gradient, as torch's AdamW does."""
    if grad_of(param).layout is not torch.strided:
        raise RuntimeError(
            f"{who} does not support sparse gradients, got one for a parameter of shape {tuple(param.shape)}: use "
            "nn.Embedding(sparse=False)"
        )
