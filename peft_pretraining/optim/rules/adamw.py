"""AdamW in three forms: in any coordinates, exactly as torch's, and with moments in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.optim.rules.update_rule import UpdateRule, upright
from peft_pretraining.optim.tensors.param_update import Direction, ParamUpdate, by_mask
from peft_pretraining.optim.tensors.state_tensor import StateTensor, zeros, zeros_like_each


class AdamW(UpdateRule):
    """D = m̂ / (√v̂ + ε'), by torch's fused kernel on a zero buffer.

    GaLore's authors add ε to √v before the bias correction, which is torch's ε divided by √(1-β2^k).
    `torch_epsilon` leaves it as torch's.
    """

    masks = True
    betas: tuple[float, float] = (0.9, 0.999)

    def __init__(self, torch_epsilon: bool = False):
        self._torch_epsilon = torch_epsilon

    def in_format(self, state_format: str) -> UpdateRule:
        return AdamW8bit(self._torch_epsilon) if state_format == "8bit" else self

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return float((group["betas"] or self.betas)[0])

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        return {key: StateTensor.like_gradient(zeros(like), shard) for key in ("exp_avg", "exp_avg_sq")}

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        beta1, beta2 = group["betas"] or self.betas
        grads = [update.low_rank_grad.contiguous() for update in updates]  # the kernel walks through memory
        minus_d = zeros_like_each(grads)
        found: list[Direction | None] = [None] * len(updates)
        for places in _alike(updates, grads):
            k, device, mask = updates[places[0]].k, grads[places[0]].device, updates[places[0]].mask
            torch._fused_adamw_(
                [minus_d[place] for place in places],
                [grads[place] for place in places],
                [updates[place].state["exp_avg"] for place in places],
                [updates[place].state["exp_avg_sq"] for place in places],
                [],
                [torch.full((), k, dtype=torch.float32, device=device)] * len(places),  # read, and not counted on
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=1.0,
                weight_decay=0.0,
                eps=self.epsilon(group["eps"], beta2, k),
                maximize=False,
                found_inf=None if mask is None else mask.found_inf(device),
            )
            for place in places:
                found[place] = Direction(minus_d[place], -float(group["lr"]), self._bias_correction(k, group))
        return found

    def _bias_correction(self, k: int, group: dict[str, Any]) -> float:
        beta1, beta2 = group["betas"] or self.betas
        return float(math.sqrt(1 - beta2**k) / (1 - beta1**k))

    def epsilon(self, eps: float, beta2: float, k: int) -> float:
        """torch's ε for the one that was set."""
        return eps if self._torch_epsilon else eps / math.sqrt(1 - beta2**k)


class TorchStep(NamedTuple):
    """The direction of torch's AdamW for a contiguous gradient, at the `k`-th update of its moments, which move on."""

    grad: Tensor
    first: Tensor
    second: Tensor
    k: int
    betas: tuple[float, float]
    eps: float

    def add_to(self, weight: Tensor, factor: float) -> None:
        if weight.dtype == self.grad.dtype and weight.is_contiguous():
            self._move(weight, -factor)
        else:
            weight.add_(self.whole(), alpha=factor)

    def whole(self) -> Tensor:
        minus_d = zeros(self.grad)
        self._move(minus_d, 1.0)
        return minus_d.neg_()

    def _move(self, weight: Tensor, rate: float) -> None:
        k = torch.full((), self.k, dtype=torch.float32, device=weight.device)
        torch._fused_adamw_(
            [weight],
            [self.grad],
            [self.first],
            [self.second],
            [],
            [k],
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )


def _alike(updates: Sequence[ParamUpdate], grads: Sequence[Tensor]) -> list[list[int]]:
    """Places of those that one call of torch's kernel can take."""
    places: dict[Hashable, list[int]] = {}
    for place, (update, grad) in enumerate(zip(updates, grads, strict=True)):
        places.setdefault((update.k, grad.device, grad.dtype, id(update.mask)), []).append(place)
    return list(places.values())


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits and one float32 scale per 256 numbers, by bitsandbytes (arXiv 2110.02861).

    Tensors of fewer than 4096 numbers (norms, biases, R of low ranks) keep float32 moments, as in bitsandbytes itself.
    Older versions kept 8 bits for matrices of any size; such a state is used as it is.
    """

    _MOMENTS = ("exp_avg", "exp_avg_sq")
    _BLOCK = 256
    _SMALLEST = 4096
    older = frozenset({"exp_avg_absmax", "exp_avg_sq_absmax"})

    def __init__(self, torch_epsilon: bool = False):
        super().__init__(torch_epsilon)
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def in_format(self, state_format: str) -> UpdateRule:
        return self

    def first_moment_decay(self, group: dict[str, Any]) -> float:
        return 1.0  # what is not in 8 bits is small, and stays in float32

    def declare_state(self, like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        if (shard.shape or like.shape).numel() < self._SMALLEST:
            return super().declare_state(like.float(), group, shard)
        return self.declare_older_state(like, shard)

    def declare_older_state(self, like: Tensor, shard: ShardInfo = WHOLE) -> dict[str, StateTensor]:
        last = shard.dim is None or shard.offset + shard.size == shard.shape[shard.dim]
        if not shard.on_all_ranks(torch.tensor(last or like.numel() % self._BLOCK == 0, device=like.device)):
            raise ValueError(
                f"adamw8bit: a part of {like.numel()} numbers is not whole blocks of {self._BLOCK}; choose another "
                "rank or number of devices"
            )
        declared = {}
        for moment in self._MOMENTS:
            numbers = torch.zeros(upright(like, shard).shape, dtype=torch.uint8, device=like.device)
            scales = torch.zeros(-(-like.numel() // self._BLOCK), dtype=torch.float32, device=like.device)
            if shard.dim is None:
                declared[moment], declared[f"{moment}_absmax"] = StateTensor(numbers), StateTensor(scales)
            else:
                declared[moment] = StateTensor(numbers, 0, shard.shape[shard.dim])
                declared[f"{moment}_absmax"] = StateTensor(scales, 0, -(-shard.shape.numel() // self._BLOCK))
        return declared

    def directions(self, updates: Sequence[ParamUpdate], group: dict[str, Any]) -> list[Direction | None]:
        found: list[Direction | None] = [None] * len(updates)
        wide = [place for place, update in enumerate(updates) if update.state["exp_avg"].dtype != torch.uint8]
        in_float = [replace(updates[place], low_rank_grad=updates[place].low_rank_grad.float()) for place in wide]
        for place, direction in zip(wide, super().directions(in_float, group), strict=True):
            assert direction is not None
            found[place] = direction._replace(tensor=direction.tensor.to(updates[place].low_rank_grad.dtype))
        narrow = [place for place in range(len(updates)) if place not in set(wide)]
        self._in_bytes([updates[place] for place in narrow], narrow, found, group)
        return found

    def _in_bytes(
        self,
        updates: Sequence[ParamUpdate],
        places: Sequence[int],
        found: list[Direction | None],
        group: dict[str, Any],
    ) -> None:
        """D of those whose moments are in 8 bits."""
        grads = []
        for update in updates:
            grad = update.low_rank_grad  # the kernel does not take float64
            grad = grad.float() if grad.dtype == torch.float64 else grad
            grads.append(upright(grad, update.low_rank_shard).contiguous())
        minus_d = zeros_like_each(grads)
        keys = (*self._MOMENTS, *sorted(self.older))
        with ExitStack() as guards:
            for mask, masked in by_mask(updates):
                if mask is not None:
                    moved = [part for part, update in zip(minus_d, updates, strict=True) if update.mask is mask]
                    guards.enter_context(mask.guarding([*moved, *(each.state[key] for each in masked for key in keys)]))
            for update, grad, part in zip(updates, grads, minus_d, strict=True):
                self._move_by_kernel(update, grad, part, group)
        for place, update, part in zip(places, updates, minus_d, strict=True):
            direction = upright(part, update.low_rank_shard).to(update.low_rank_grad.dtype)
            found[place] = Direction(direction, -float(group["lr"]), self._bias_correction(update.k, group))

    def _move_by_kernel(self, update: ParamUpdate, grad: Tensor, minus_d: Tensor, group: dict[str, Any]) -> None:
        """bitsandbytes' kernel, which takes one tensor at a time."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state, k = update.state, update.k
        signed, unsigned = self._quantization_maps(grad.device)
        beta1, beta2 = group["betas"] or self.betas
        optimizer_update_8bit_blockwise(
            "adam",
            grad,
            minus_d,
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1,
            beta2,
            0.0,
            0.0,
            self.epsilon(group["eps"], beta2, k),
            k,
            1.0,
            signed,
            unsigned,
            state["exp_avg_absmax"],
            state["exp_avg_sq_absmax"],
        )

    def rotate_momentum(
        self, state: dict[str, Tensor], change: Callable[[Tensor], Tensor], shard: ShardInfo = WHOLE
    ) -> None:
        if state["exp_avg"].dtype != torch.uint8:
            super().rotate_momentum(state, change, shard)
            return
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        code, moment, absmax = self._quantization_maps(state["exp_avg"].device)[0], state["exp_avg"], "exp_avg_absmax"
        dequantized = dequantize_blockwise(moment, absmax=state[absmax], code=code, blocksize=self._BLOCK)
        changed = upright(change(upright(dequantized, shard)), shard).contiguous()
        quantized, scales = quantize_blockwise(changed, code=code, blocksize=self._BLOCK)
        moment.copy_(quantized)
        state[absmax].copy_(scales.absmax)

    def _quantization_maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The 256 values of a signed and of an unsigned byte."""
        if device not in self._maps:
            from bitsandbytes.functional import create_dynamic_map

            signed, unsigned = (create_dynamic_map(signed=each).to(device) for each in (True, False))  # type: ignore[no-untyped-call]
            self._maps[device] = (signed, unsigned)
        return self._maps[device]
