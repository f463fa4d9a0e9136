"""`VectorAdamW`'s update for many matrices of one shape at once, which may turn out not to take place.

On a GPU an operation on one small matrix takes as long to launch as one on all of them. Where `found_inf` (a float32
scalar on the device) is not 0, what was there before is put back in place of what has been computed, so that nobody has
to read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_pretraining.optim.rules.torch_adamw import torch_step
from peft_pretraining.optim.tensors.rounding import Noise, round_stack_

NUMBERS_AT_ONCE = 2**26
"""Of a weight that is moved together with others: each copy of as many is 256 MB in float32."""


class Matrix(NamedTuple):
    """A parameter in an update: this device's parts."""

    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    noise: Noise | None = None
    """What the weight is rounded with, stochastically; None: to nearest."""


@dataclass(frozen=True)
class Masked:
    """What depends on whether the update takes place; without `found_inf` it does."""

    found_inf: Tensor | None = None

    @property
    def counted(self) -> Tensor | float:
        """1, or 0 for an update that does not take place."""
        return 1.0 if self.found_inf is None else 1 - self.found_inf

    def or_old(self, new: Tensor, old: Tensor) -> Tensor:
        """`new`, or `old`, whatever `new` holds."""
        return new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new)


def alike(matrices: Iterable[Matrix], at_once: int = NUMBERS_AT_ONCE) -> Iterator[list[Matrix]]:
    """Matrices of equal kinds, in lots of about `at_once` numbers."""
    kinds: dict[tuple[Any, ...], list[Matrix]] = {}
    for each in matrices:
        first, second, noise = each.state["exp_avg"], each.state["exp_avg_sq"], each.noise
        kind = (each.weight.shape, each.weight.dtype, each.grad.dtype, each.weight.device, each.state["step"].shape)
        shard = None if noise is None else noise.shard
        kinds.setdefault((*kind, first.dtype, second.dtype, shard), []).append(each)
    for members in kinds.values():
        length = max(1, at_once // max(1, members[0].weight.numel()))
        for start in range(0, len(members), length):
            yield members[start : start + length]


def move_as_torch(
    weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any], masked: Masked
) -> None:
    """Update tensors of any shape that have one count each by torch's fused kernel, which counts."""
    torch_step(
        weights,
        [grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True)],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["step"] for state in states],
        group,
        masked.found_inf,
    )


def count(steps: Sequence[Tensor], masked: Masked) -> None:
    """Let all counts know of one more update."""
    torch._foreach_add_(list(steps), masked.counted)


def corrections(steps: Sequence[Tensor], group: dict[str, Any], masked: Masked, dims: int) -> tuple[Tensor, Tensor]:
    """lr / (1-β1^τ) and √(1-β2^τ) for counts τ that are updated already, one for each matrix and vector, in float64.

    Shaped to multiply a stack of matrices of `dims` dimensions.
    """
    beta1, beta2 = group["betas"]
    counts = torch.stack(list(steps)).double()  # (L,) or (L, r)
    if masked.found_inf is not None:  # as if it took place: never 0
        counts = counts + masked.found_inf
    shape = {None: (-1, *[1] * dims), 0: (len(steps), -1, 1), 1: (len(steps), 1, -1)}[group["vectors"]]
    return (group["lr"] / (1 - beta1**counts)).view(shape), (1 - beta2**counts).sqrt_().view(shape)


def move(matrices: Sequence[Matrix], group: dict[str, Any], masked: Masked, wide: torch.dtype) -> None:
    """Update matrices of equal kinds, whose counts are updated already, with arithmetic in `wide`."""
    (beta1, beta2), decay = group["betas"], group["lr"] * group["weight_decay"]
    weights = [each.weight for each in matrices]
    rates, roots = corrections([each.state["step"] for each in matrices], group, masked, weights[0].ndim)
    moments = [[each.state[key] for each in matrices] for key in ("exp_avg", "exp_avg_sq")]
    grads = torch.stack([each.grad for each in matrices]).to(wide)
    before = [torch.stack(tensors).to(wide) for tensors in (weights, *moments)]
    first = torch.lerp(before[1], grads, 1 - beta1)
    second = (before[2] * beta2).addcmul_(grads, grads, value=1 - beta2)
    for kept, old, new in zip(moments, before[1:], (first, second), strict=True):
        torch._foreach_copy_(kept, list(masked.or_old(new, old).unbind()))
    denominators = second.sqrt_().div_(roots.to(wide)).add_(group["eps"])
    moved = before[0] * (1 - decay) if decay else before[0]
    moved = moved - first.mul_(rates.to(wide)).div_(denominators)
    put(weights, masked.or_old(moved, before[0]), [each.noise for each in matrices])


def put(weights: Sequence[Tensor], moved: Tensor, noises: Sequence[Noise | None]) -> None:
    """Round a stack of wide weights into those that they belong to. `moved` may be used up."""
    drawn = [noise for noise in noises if noise is not None]
    if drawn:
        rows = slice(0, moved.shape[1] if moved.ndim > 1 else 1)
        moved = round_stack_(moved.contiguous(), drawn, rows)
    torch._foreach_copy_(list(weights), list(moved.unbind()))
