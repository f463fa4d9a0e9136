"""AdamW that counts updates for each row or column of a matrix, so that one vector's state can begin afresh."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from peft_pretraining.distributed.sharding import ShardInfo, local
from peft_pretraining.optim import vector_batches as batches
from peft_pretraining.optim.state.base import InPlaceOptimizer, gradient_of
from peft_pretraining.optim.state.saved_state import other_state
from peft_pretraining.optim.state.settings import check_betas, check_keys, check_numbers
from peft_pretraining.optim.state.state_reset import MOMENTS
from peft_pretraining.optim.tensors.launching import launches_cost
from peft_pretraining.optim.tensors.rounding import Noise, round_stochastically
from peft_pretraining.optim.tensors.state_tensor import FASTEST_FORGOTTEN, ROUNDINGS, STATE_FORMATS, working_dtype
from peft_pretraining.optim.tensors.zeroing import Vectors, zero_vectors


class VectorAdamW(InPlaceOptimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), with one step count per vector where asked.

        >>> a, b = torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(5, 4))
        >>> optimizer = VectorAdamW([{"params": [a], "vectors": 0}, {"params": [b], "vectors": 1}], lr=0.1)
        >>> (b @ a).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[a]["step"]
        tensor([1., 1., 1., 1.])

    `vectors`: 0 counts the updates of each row, 1 of each column, None (the default) of the whole tensor. Per element,
    with τ the count: m ← β1 m + (1-β1) g, v ← β2 v + (1-β2) g², p ← p (1 - lr·wd), then
    p ← p - lr · m / (1-β1^τ) / (√v / √(1-β2^τ) + ε). Bias corrections are computed in float64. Moments have the
    parameter's dtype at construction and the counts, float32, the shape (r,) or (); all are on its device. Away from
    the CPU, matrices of one shape are updated together, and tensors without vectors by torch's fused kernel.

    `state_format` (published, float32 or weight), `rounding` and `seed` are as in `LowRankOptimizer`: other arithmetic
    and other states for bfloat16 parameters.
    """

    masks_updates = True
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        formats = {"state_format": "published", "rounding": "nearest", "seed": 0}
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "vectors": None}
        super().__init__(params, {**own, **formats})

    def _check_keys(self, given: Collection[str]) -> None:
        check_keys(given, self.defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_numbers(group)
        check_betas(group["betas"])
        for name, known in (("state_format", STATE_FORMATS[:3]), ("rounding", ROUNDINGS)):
            if group[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {group[name]!r}")

    def _check_saved_group(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        if saved["vectors"] != own["vectors"]:
            raise ValueError(f"state of other vectors: {saved['vectors']!r} instead of {own['vectors']!r}")
        if saved["state_format"] != own["state_format"]:
            raise other_state("state_format", saved["state_format"], own["state_format"])

    def _new_states(self, group: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        states = {}
        for param in group["params"]:
            vectors = group["vectors"]
            if vectors is not None and (type(vectors) is not int or vectors not in (0, 1) or param.ndim != 2):
                raise ValueError(f"vectors must be None, or 0 or 1 for matrices, got {vectors!r} for {param.ndim} dims")
            count = () if vectors is None else (param.shape[vectors],)
            if vectors is not None and ShardInfo.of(param).dim == vectors:
                raise ValueError(f"a parameter of shape {tuple(param.shape)} is divided within its vectors' counts")
            states[param] = {
                "step": torch.zeros(count, dtype=torch.float32, device=param.device),
                **self._new_moments(param, group),
            }
        return states

    def _new_moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        wide = working_dtype(group["state_format"], param.dtype)
        narrow = group["state_format"] == "weight" and group["betas"][0] <= FASTEST_FORGOTTEN
        first = param.dtype if narrow else wide
        return {key: torch.zeros_like(param, dtype=first if key == "exp_avg" else wide) for key in MOMENTS}

    def reset_vectors(self, param: Tensor, index: Tensor, counts: bool = True) -> None:
        """Zero the moments of some of a parameter's vectors and, with `counts`, let them count updates from 0 again.

        `index` (int64) says which.
        """
        self.reset_many([(param, index.tolist())], counts)

    def reset_many(self, chosen: Sequence[tuple[Tensor, list[int]]], counts: bool = True) -> None:
        """`reset_vectors` for some vectors of each of several parameters of one device."""
        parts: list[Vectors] = []
        for param, indices in chosen:
            state, dim = self.local_state(param), self.group_of(param)["vectors"]
            parts += [Vectors(tensor, place, indices) for tensor, place in self._by_vectors(state, dim)]
            if counts:
                parts.append(Vectors(state["step"], 0, indices))
        if chosen:
            zero_vectors(parts, local(chosen[0][0]).device)

    def _by_vectors(self, state: dict[str, Tensor], dim: int) -> list[tuple[Tensor, int]]:
        """The moments of a parameter, each with the dimension along which its vectors lie."""
        return [(state[key], dim) for key in MOMENTS]

    @_disable_dynamo  # as torch's own: it may be called in code that is compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Attributes `found_inf` and `grad_scale` (scalars on the device), where somebody has set them, are honoured as by
        torch's fused optimizers: an update with `found_inf` leaves no trace, and gradients are divided by `grad_scale`.
        Away from the CPU nobody waits for either.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        present = {param for param, _ in self._with_gradients()}
        together = self._batched(present)
        if found_inf is not None and not together and bool(found_inf):
            return loss
        if grad_scale is not None:
            self.scale_(1 / grad_scale)
        for group in self.param_groups:
            if params := [param for param in group["params"] if param in present]:
                if together:
                    self._update_together(params, group, batches.Masked(found_inf))
                else:
                    self._update(params, group)
        return loss

    def _batched(self, params: Collection[Tensor]) -> bool:
        """Whether matrices of one shape are stacked: where launches cost time, and reading a number does."""
        return any(launches_cost(param.device) for param in params)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One parameter after the other, in place."""
        states = [self.local_state(param) for param in params]
        if group["state_format"] == "published" and group["rounding"] == "nearest":
            self._move([local(param) for param in params], [gradient_of(param) for param in params], states, group)
            return
        noises = self._noises(params, states, group)
        for param, state, noise in zip(params, states, noises, strict=True):  # float32 copies exist of one at a time
            weight, wide = local(param), torch.promote_types(param.dtype, torch.float32)
            moved = weight.to(wide)
            moments = {key: state[key].to(wide) for key in MOMENTS}
            self._move([moved], [gradient_of(param)], [{**state, **moments}], group)
            for key, moment in moments.items():
                state[key].copy_(moment)
            if noise is not None:
                round_stochastically(weight, moved, noise)
            elif moved is not weight:
                weight.copy_(moved)

    def _update_together(self, params: list[Tensor], group: dict[str, Any], masked: batches.Masked) -> None:
        """All of one shape at once."""
        states = [self.local_state(param) for param in params]
        weights, grads = [local(param) for param in params], [gradient_of(param) for param in params]
        as_published = group["state_format"] == "published" and group["rounding"] == "nearest"
        if as_published and group["vectors"] is None:
            batches.move_as_torch(weights, grads, states, group, masked)
            return
        noises = self._noises(params, states, group)
        batches.count([state["step"] for state in states], masked)
        matrices = [batches.Matrix(*each) for each in zip(weights, grads, states, noises, strict=True)]
        for lot in batches.alike(matrices):
            dtype = lot[0].weight.dtype
            batches.move(lot, group, masked, dtype if as_published else torch.promote_types(dtype, torch.float32))

    def _noises(
        self, params: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]
    ) -> list[Noise | None]:
        """What parameters are rounded with in the update that is being made, the loop's or that of their largest
        counts; None for rounding to nearest."""
        if group["rounding"] == "nearest":
            return [None] * len(params)
        names = self._names(group)
        found: list[Noise | None] = []
        for param, state in zip(params, states, strict=True):
            if param.dtype != torch.bfloat16:
                found.append(None)
                continue
            step = int(state["step"].max()) if self.update_step is None else self.update_step
            found.append(Noise(group["seed"], names[param], step, ShardInfo.of(param)))
        return found

    def _names(self, group: dict[str, Any]) -> dict[Tensor, str]:
        """The names of a group's parameters; without names, which one of which group each is."""
        if names := group.get("param_names"):
            return {param: str(name) for param, name in zip(group["params"], names, strict=True)}
        number = next(number for number, other in enumerate(self.param_groups) if other is group)
        return {param: f"{number}.{place}" for place, param in enumerate(group["params"])}

    def _move(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        """The formulas, for local tensors."""
        beta1, beta2 = group["betas"]
        steps, first, second = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
        grads = [grad.to(m.dtype) for grad, m in zip(grads, first, strict=True)]
        torch._foreach_add_(steps, 1)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)

        counts = torch.cat([step.reshape(-1) for step in steps]).double()  # those of all parameters at once
        sizes = [step.numel() for step in steps]
        rates = (group["lr"] / (1 - beta1**counts)).split(sizes)
        roots = (1 - beta2**counts).sqrt().split(sizes)
        denominators = torch._foreach_sqrt(second)
        for param, m, denominator, rate, root in zip(params, first, denominators, rates, roots, strict=True):
            shape = {None: (), 0: (-1, 1), 1: (1, -1)}[group["vectors"]]
            root, rate = root.reshape(shape).to(m.dtype), rate.reshape(shape).to(m.dtype)
            denominator.div_(root).add_(group["eps"])
            param.sub_(rate * m / denominator)
