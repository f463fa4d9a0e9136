"""Updates that go on without a look at whether they take place, and what becomes of them once somebody knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peft_pretraining.optim.projected_gradients import ProjectedGradients
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.mask import Mask
from peft_pretraining.optim.tensors.state_tensor import counts


class MaskedUpdates(ProjectedGradients):
    """Knows which updates can be masked on the device, and settles them."""

    masks_updates = True
    reads_found_inf: bool | None = None
    """Whether `step` reads `found_inf`, instead of masking the update. None: where that lies on the CPU."""
    _unsettled: Mask | None = None
    """Of the last update, if nobody has read yet whether it took place."""

    def step_of(self, param: Tensor) -> int:
        if self.update_step is None:
            self.settle()  # the parameter's own count decides
        return super().step_of(param)

    def mask_of(self, moving: Sequence[tuple[Tensor, dict[str, Any]]]) -> Mask | None:
        """What this update is masked by if it goes on without a look at `found_inf`: not where that lies on the CPU,
        where a look costs nothing, where new bases are to be stored, or where an object needs to know."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not all(self.objects(param).masks for param, _ in moving):
            return None
        reads = found_inf.device.type == "cpu" if self.reads_found_inf is None else self.reads_found_inf
        if reads or any(self.changes_basis(param, group) for param, group in moving):
            return None
        return None if self._must_know([param for param, _ in moving]) else Mask(found_inf)

    def _must_know(self, params: Sequence[Tensor]) -> bool:
        """Whether a rule does."""
        rules = [self.objects(param).rule for param in params]
        asked = [place for place, rule in enumerate(rules) if type(rule).must_know is not UpdateRule.must_know]
        known = counts([self.state[params[place]]["step"] for place in asked])
        return any(rules[place].must_know(count + 1) for place, count in zip(asked, known, strict=True))

    def changes_basis(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether this update stores a new basis, or would if its gradient were finite."""
        projected, subspace = self.projected.get(param), self.subspaces.get(param)
        if projected is not None:
            return projected.changes_bases
        return subspace is not None and subspace.refresh_is_due(self.state[param], group, self.step_of(param))

    def _alike_together(
        self, moving: Sequence[tuple[Tensor, dict[str, Any]]]
    ) -> Sequence[tuple[Tensor, dict[str, Any]]]:
        """By shape within each group, where rules stack what is alike: so that a lot has few shapes."""
        if not any(launches_cost(param.device) for param, _ in moving):
            return moving
        places = {id(group): place for place, group in enumerate(self.param_groups)}
        return sorted(moving, key=lambda each: (places[id(each[1])], tuple(each[0].shape)))

    def _lots(self, params: Sequence[Tensor]) -> int:
        """For `move`."""
        if any(self._slots[param].shard.dim is not None for param in params):
            return 4
        return 2 if any(launches_cost(param.device) for param in params) else 1

    def settle(self, skipped: bool | None = None) -> None:
        """Tells whether the last update that went on without a look at `found_inf` was to be left out: what was counted
        for it is taken back then. None looks at it now."""
        if self._unsettled is not None:
            self._unsettled.settle(skipped)
            self._unsettled = None

    def settle_all(self) -> None:
        self.settle()
        for follower in self._followers:
            follower.settle()

    def read_late(self) -> None:
        self.reads_found_inf = False
        for follower in self._followers:
            follower.read_late()

    def state_dict(self) -> dict[str, Any]:
        self.settle_all()
        return super().state_dict()

    def _loaded(self) -> None:
        self._unsettled = None
        super()._loaded()
