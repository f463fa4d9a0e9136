"""The norm-growth limiter of Fira (arXiv 2410.01623), which APOLLO, RACS and Alice have, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_pretraining.optim.tensors.param_update import ParamUpdate
from peft_pretraining.optim.tensors.state_tensor import StateTensor


class NormGrowthLimiter:
    """Lets the norm of a matrix's step grow by no more than a factor `growth` from one update to the next.

    With the norm s = ‖S‖ and φ, the limited norm of the update before:

        l = max(s / (φ + epsilon), growth) / growth,    S <- S / l,    φ <- s / l

    The first norm is not limited, and a step of zero changes nothing: in the authors' code φ becomes 0 then, and the
    norm has to grow by 1% an update from there.

    >>> import torch
    >>> limiter = NormGrowthLimiter(growth=1.5)
    >>> state = {key: tensor.value for key, tensor in limiter.declare_state(torch.zeros(2, 2)).items()}
    >>> update = ParamUpdate("w", 0, torch.zeros(2, 2), torch.zeros(2, 2), state, step=0, rate=1.0)
    >>> [float(limiter.divisors([update], [torch.tensor(norm)])[0]) for norm in (2.0, 3.0, 0.0, 9.0)]
    [1.0, 1.0, 1.0, 2.0]
    """

    KEY = "limited_norm"

    def __init__(self, growth: float = 1.01, epsilon: float = 1e-8):
        self.growth, self.epsilon = growth, epsilon

    def declare_state(self, like: Tensor) -> dict[str, StateTensor]:
        """φ, a scalar in float32 at least; 0 says that there is none yet."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return {self.KEY: StateTensor(like.new_zeros((), dtype=wide))}

    def divisors(self, updates: Sequence[ParamUpdate], norms: Sequence[Tensor]) -> list[Tensor]:
        """What each matrix's step is to be divided by, scalars; φ follows, unless the update must leave no trace.
        `norms` are those of whole matrices."""
        kept = [update.state[self.KEY] for update in updates]
        if not kept:
            return []
        mask = updates[0].mask
        assert all(update.mask is mask for update in updates)
        before = torch.stack(kept)
        limited = before.clone()
        divisors = self.divisor(limited, torch.stack([norm.to(before.dtype) for norm in norms]))
        torch._foreach_copy_(kept, list((limited if mask is None else mask.choose(before, limited)).unbind()))
        return list(divisors.unbind())

    def divisor(self, limited: Tensor, now: Tensor) -> Tensor:
        """What steps with norms `now` are to be divided by; φ of each, `limited`, follows in its place."""
        growth = torch.where(limited > 0, now / (limited + self.epsilon), 1.0)
        divisors = growth.clamp(min=self.growth) / self.growth
        limited.copy_(torch.where(now > 0, now / divisors, limited))
        return torch.where(now > 0, divisors, 1.0)  # a step of zero may be divided by anything
