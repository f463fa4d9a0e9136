"""Update rules: what becomes of a gradient, in low-rank coordinates or, for unprojected weights, in full ones.

A rule turns a gradient into a direction D, in the same coordinates, and a factor; the weight then moves by
-factor * finish(scale * back(D)). Each formula stands here once, for GaLore, GoLore, Online Subspace Descent, their
bases' own optimizers, and parameters that are not projected. `state["step"]` is k, this parameter's updates, this one
included. `group` holds the settings. Tensors are this device's parts; `shard` says of what.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from peft_pretraining.distributed.sharding import WHOLE, ShardInfo
from peft_pretraining.optim.rule import UpdateRule, mean, upright, zeros


class AdamW(UpdateRule):
    """D = m̂ / (√v̂ + ε'), by torch's fused kernel on a zero buffer.

    GaLore's authors add ε to √v before the bias correction, which is torch's ε divided by √(1-β2^k).
    `torch_epsilon` leaves it as torch's.
    """

    betas = (0.9, 0.999)

    def __init__(self, torch_epsilon: bool = False):
        self._torch_epsilon = torch_epsilon

    def init_state(self, state: dict[str, Any], like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> None:
        state["exp_avg"] = zeros(like)
        state["exp_avg_sq"] = zeros(like)

    def direction(
        self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE
    ) -> tuple[Tensor, float]:
        grad = grad.contiguous()  # the kernel walks through memory
        k, minus_d = int(state["step"]), torch.zeros_like(grad)
        beta1, beta2 = group["betas"] or self.betas
        adamw(
            *([minus_d], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], []),
            [torch.full((), k - 1.0, device=grad.device)],  # which torch increments
            **{"fused": True, "amsgrad": False, "maximize": False, "lr": 1.0, "weight_decay": 0.0},
            **{"beta1": beta1, "beta2": beta2, "eps": self.epsilon(group["eps"], beta2, k)},
        )
        return minus_d, -float(group["lr"])

    def epsilon(self, eps: float, beta2: float, k: int) -> float:
        """torch's ε for the one that was set."""
        return eps if self._torch_epsilon else eps / math.sqrt(1 - beta2**k)


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits and one float32 scale per 256 numbers, by bitsandbytes (arXiv 2110.02861).

    Tensors of fewer than 4096 numbers (norms, biases, R of low ranks) keep float32 moments, as in bitsandbytes itself.
    Older versions kept 8 bits for matrices of any size; such a state is used as it is.
    """

    _BLOCK = 256
    _SMALLEST = 4096
    older = frozenset({"exp_avg_absmax", "exp_avg_sq_absmax"})

    def __init__(self, torch_epsilon: bool = False):
        super().__init__(torch_epsilon)
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def init_state(self, state: dict[str, Any], like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> None:
        if (shard.shape or like.shape).numel() < self._SMALLEST:
            super().init_state(state, like.float(), group)
        else:
            self._init_blocks(state, like, shard)

    def init_older_state(self, state: dict[str, Any], like: Tensor, shard: ShardInfo = WHOLE) -> None:
        self._init_blocks(state, like, shard)

    def _init_blocks(self, state: dict[str, Any], like: Tensor, shard: ShardInfo) -> None:
        last = shard.dim is None or shard.offset + shard.size == shard.shape[shard.dim]
        if not shard.on_all_ranks(torch.tensor(last or like.numel() % self._BLOCK == 0, device=like.device)):
            raise ValueError(
                f"adamw8bit: a part of {like.numel()} numbers is not whole blocks of {self._BLOCK}; choose another "
                "rank or number of devices"
            )
        blocks = -(-like.numel() // self._BLOCK)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros(upright(like, shard).shape, dtype=torch.uint8, device=like.device)
            state[f"{moment}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=like.device)

    def divided(self, key: str, value: Tensor, shard: ShardInfo) -> tuple[int, int] | None:
        if shard.dim is None:
            return None
        if value.is_floating_point() and key in ("exp_avg", "exp_avg_sq"):
            return super().divided(key, value, shard)
        if key.endswith("_absmax"):
            return 0, -(-shard.shape.numel() // self._BLOCK)
        return 0, shard.shape[shard.dim]

    def direction(
        self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE
    ) -> tuple[Tensor, float]:
        if state["exp_avg"].dtype != torch.uint8:
            direction, factor = super().direction(state, grad.float(), group)
            return direction.to(grad.dtype), factor
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        k, (signed, unsigned) = int(state["step"]), self._quantization_maps(grad.device)
        beta1, beta2 = group["betas"] or self.betas
        dtype = grad.dtype  # the kernel does not take float64
        grad = upright(grad.float() if dtype == torch.float64 else grad, shard).contiguous()
        minus_d = torch.zeros_like(grad)
        optimizer_update_8bit_blockwise(
            *("adam", grad, minus_d, state["exp_avg"], state["exp_avg_sq"], beta1, beta2, 0.0, 0.0),
            *(self.epsilon(group["eps"], beta2, k), k, 1.0, signed, unsigned),
            *(state["exp_avg_absmax"], state["exp_avg_sq_absmax"]),
        )
        return upright(minus_d, shard).to(dtype), -float(group["lr"])

    def rotate(self, state: dict[str, Any], change: Callable[[Tensor], Tensor], shard: ShardInfo = WHOLE) -> None:
        if state["exp_avg"].dtype != torch.uint8:
            super().rotate(state, change, shard)
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

            self._maps[device] = tuple(create_dynamic_map(signed=signed).to(device) for signed in (True, False))
        return self._maps[device]


class Adafactor(UpdateRule):
    """Second moments of a matrix as row and column means, updates clipped to a root mean square of 1.

    Source: arXiv 1804.04235, algorithm 4. Fixed: ε = 1e-30, decay 1 - k^-0.8, no relative step, no parameter scale.
    `beta1` adds a first moment, of the update already multiplied by the rate.
    """

    decays_first = True
    optional = frozenset({"exp_avg"})
    _EPS, _DECAY, _CLIP = 1e-30, 0.8, 1.0

    def init_state(self, state: dict[str, Any], like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)  # 1e-30 and slow decay need it
        if like.ndim >= 2:
            state["exp_avg_sq_row"] = like.new_zeros(like.shape[:-1], dtype=wide)
            state["exp_avg_sq_col"] = like.new_zeros((*like.shape[:-2], like.shape[-1]), dtype=wide)
        else:
            state["exp_avg_sq"] = zeros(like, wide)
        if group["beta1"]:
            state["exp_avg"] = zeros(like)

    def divided(self, key: str, value: Tensor, shard: ShardInfo) -> tuple[int, int] | None:
        dim = {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1}.get(key)
        if shard.dim is None or dim is None:
            return super().divided(key, value, shard)
        return (0, shard.shape[dim]) if shard.dim == dim else None

    def direction(
        self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE
    ) -> tuple[Tensor, float]:
        decay = 1 - int(state["step"]) ** -self._DECAY
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        square = wide.square().add_(self._EPS)
        if grad.ndim >= 2:
            row = state["exp_avg_sq_row"].lerp_(mean(square, grad.ndim - 1, shard), 1 - decay)
            col = state["exp_avg_sq_col"].lerp_(mean(square, grad.ndim - 2, shard), 1 - decay)
            row_mean = mean(row, grad.ndim - 2, shard).unsqueeze(-1)  # (..., 1)
            scale = (row / row_mean).rsqrt_().unsqueeze(-1)  # (..., m, 1)
            update = wide * scale * col.rsqrt().unsqueeze(-2)  # (..., m, n)
        else:
            update = wide * state["exp_avg_sq"].lerp_(square, 1 - decay).rsqrt()
        numbers = update.numel() if shard.dim is None else shard.shape.numel()
        rms = (shard.sum(update.square().sum()) / numbers).sqrt()
        update.div_((rms / self._CLIP).clamp_(min=1.0)).mul_(float(group["lr"]))
        if group["beta1"]:
            if self.first_moment not in state:  # switched on since
                state[self.first_moment] = zeros(grad)
            update = state["exp_avg"].lerp_(update.to(grad.dtype), 1 - group["beta1"])
        return update.to(grad.dtype), 1.0


class Lion(UpdateRule):
    """The sign, in full space, of a mixture of momentum and gradient (arXiv 2302.06675, algorithm 2)."""

    acts_in_full_space = True
    betas = (0.9, 0.99)

    def init_state(self, state: dict[str, Any], like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> None:
        state["exp_avg"] = zeros(like)

    def direction(
        self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE
    ) -> tuple[Tensor, float]:
        beta1, beta2 = group["betas"] or self.betas
        mixture = torch.lerp(state["exp_avg"], grad, 1 - beta1)
        state["exp_avg"].lerp_(grad, 1 - beta2)
        return mixture, float(group["lr"])

    def finish(self, update: Tensor) -> Tensor:
        return update.sign_()


class SGD(UpdateRule):
    """b = R at first, then b <- μ b + (1 - dampening) R. Without momentum there is no state."""

    first_moment = "momentum_buffer"
    optional = frozenset({"momentum_buffer"})

    def init_state(self, state: dict[str, Any], like: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE) -> None:
        if group["momentum"]:
            state[self.first_moment] = zeros(like)

    def direction(
        self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], shard: ShardInfo = WHOLE
    ) -> tuple[Tensor, float]:
        if not group["momentum"]:
            return grad, float(group["lr"])
        if self.first_moment not in state:  # switched on since
            state[self.first_moment] = grad.clone()
            return state[self.first_moment], float(group["lr"])
        buffer = state[self.first_moment]
        if int(state["step"]) == 1:
            buffer.copy_(grad)
        else:
            buffer.mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])
        return buffer, float(group["lr"])


UPDATE_RULES: dict[str, type[UpdateRule]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "sgd": SGD,
}
