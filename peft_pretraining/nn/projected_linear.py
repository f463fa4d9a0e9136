"""Linear layers whose backward pass returns the projected gradient R of their weight, and forms no G.

For y = x Wᵀ with N tokens, x (N, n), dY (N, m) and G = dYᵀ X (m, n), GaLore's R (arXiv 2403.03507, algorithm 2) is

    Pᵀ G   = (dY P)ᵀ X           2 N r (m + n) operations instead of 2 N m n, and r (m + n) more numbers of activations
    G Qᵀ   = dYᵀ (X Qᵀ)          as many; X Qᵀ (N, r) is kept for the backward pass instead of X
    Pᵀ G Qᵀ = (dY P)ᵀ (X Qᵀ)

R is the gradient of a leaf: a parameter of R's shape that takes no memory and whose values nobody reads. So autograd
adds it up over micro-batches, DDP reduces it in its buckets, and checkpointing and compilers need know nothing of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.models.compute_dtype import Linear
from peft_pretraining.optim.low_rank import LowRankOptimizer
from peft_pretraining.optim.projected_backward import ProjectedBackward
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, Bases, Projection

Receive = Callable[[Tensor], Tensor | None]
"""Takes G (m, n) of one backward pass; returns R of all of them where this was the last one, else None."""


class _Product(torch.autograd.Function):
    """x Wᵀ, or (silu(x) * up) Wᵀ, whose backward pass gives R to `leaf`; W has no gradient.

    x (..., n), `up` like it or None, W (m, n), P (m, r) or None, Q (r, n) or None. Products are in the dtype of x, sums
    over micro-batches in that of the leaf. With `receive`, which takes G, bases are not looked at.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        weight: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        leaf: Tensor,
        receive: Receive | None,
    ) -> Tensor:
        inputs = x if up is None else F.silu(x).mul_(up)
        low = None
        if right is not None and receive is None:
            low = inputs.reshape(-1, inputs.shape[-1]) @ right.to(x.dtype).T  # (N, n) @ (n, r) -> (N, r)
        kept = x if up is not None or low is None else None
        ctx.save_for_backward(kept, up, weight, left, low)
        ctx.receive, ctx.sum_dtype = receive, leaf.dtype
        return F.linear(inputs, weight.to(x.dtype))  # (..., n) @ (n, m) -> (..., m)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, up, weight, left, low = ctx.saved_tensors
        of_x = of_up = of_leaf = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_x = grad_output @ weight.to(grad_output.dtype)
        inputs = low
        if inputs is None:
            inputs = x if up is None else F.silu(x).mul_(up)
            inputs = inputs.reshape(-1, inputs.shape[-1])
        outputs = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.receive is not None:
            of_leaf = ctx.receive(outputs.T @ inputs)  # (m, N) @ (N, n) -> (m, n)
        else:
            outputs = outputs if left is None else outputs @ left.to(outputs.dtype)  # (N, m) @ (m, r) -> (N, r)
            of_leaf = (outputs.T @ inputs).to(ctx.sum_dtype)
        if up is not None and of_x is not None:
            of_x, of_up = torch.ops.aten.silu_backward(of_x * up, x), F.silu(x).mul_(of_x)
        return of_x, of_up, None, None, None, of_leaf, None


class ProjectedLinear(Linear):
    """y = x Wᵀ + bias in the dtype of x. Made by `become_projected`, of a layer whose weight stays the object it is."""

    leaf: nn.Parameter
    projection: Projection
    kept_bases: dict[str, Tensor]
    """Bases as the optimizer keeps them, with scales where it does, or new ones of which nothing is kept yet."""
    receive: Receive | None
    """Takes G in updates that make a basis from it."""

    @property
    def runs_eagerly(self) -> bool:
        """Whether its passes are not those that a compiler has seen (models/compiled.py)."""
        return self.receive is not None

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, None)

    def of_gated_product(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._product(gate, up)

    def _product(self, x: Tensor, up: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x) if up is None else super().of_gated_product(x, up)
        bases: Bases = {} if self.receive is not None else self.projection.bases(self.kept_bases)
        left, right = bases.get(LEFT), bases.get(RIGHT)
        # Detached, W has no gradient: what holds it, names it and wraps it sees the parameter that it always was.
        product: Tensor = _Product.apply(x, up, self.weight.detach(), left, right, self.leaf, self.receive)
        return product if self.bias is None else product + self.bias.to(x.dtype)


def can_project(layer: nn.Module) -> bool:
    """Whether `become_projected` takes a layer: none that is quantised, has factors or a forward of its own."""
    return type(layer) in (nn.Linear, Linear) and "forward" not in vars(layer)


def become_projected(layer: nn.Linear, leaf: nn.Parameter, projection: Projection) -> ProjectedLinear:
    """Make a linear layer one that returns R, in place.

    >>> from peft_pretraining.optim.low_rank import LowRankOptimizer
    >>> layer = nn.Linear(4, 6, bias=False)
    >>> projection = Projection.for_weight("std", 2, layer.weight.shape)
    >>> projected = become_projected(layer, nn.Parameter(torch.zeros(()).expand(6, 2)), projection)
    >>> projected.kept_bases = projection.stored_bases({"right_basis": torch.eye(2, 4)})
    >>> projected(torch.ones(3, 4)).sum().backward()
    >>> layer.weight.grad is None, projected.leaf.grad.tolist() == [[3.0, 3.0]] * 6
    (True, True)
    """
    assert can_project(layer)
    layer.__class__ = ProjectedLinear
    # Not as attributes of a module: they are no parameters of the model.
    vars(layer).update(leaf=leaf, projection=projection, kept_bases={}, receive=None)
    assert isinstance(layer, ProjectedLinear)
    return layer


def project_backward(
    model: nn.Module, optimizer: LowRankOptimizer, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, str]:
    """Let the backward pass of `model` give `optimizer` R of the weights that it projects, wherever a layer can.

    `reduce` averages a tensor over the ranks, in place. Returns, by name, why a weight's gradient is formed as before.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    >>> groups = [{"params": [model[0].bias, *model[2].parameters()]}, {"params": [model[0].weight], "rank": 2}]
    >>> optimizer = LowRankOptimizer(groups)
    >>> project_backward(model, optimizer)
    {}
    >>> optimizer.begin_update(0)
    >>> model(torch.ones(3, 4)).sum().backward()
    >>> optimizer.step()
    >>> model[0].weight.grad is None, int(optimizer.state[model[0].weight]["step"])
    (True, 1)
    """
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, param in module.named_parameters(recurse=False):
            owners[param].append((f"{name}.{key}" if name else key, module))
    layers, kept = {}, {}
    for weight, subspace in optimizer.subspaces.items():
        if reason := _why_not(weight, owners[weight], optimizer):
            kept[optimizer.name_of(weight)] = reason
            continue
        ((_, layer),) = owners[weight]
        assert isinstance(layer, nn.Linear) and isinstance(weight, nn.Parameter)
        layers[weight] = become_projected(layer, ProjectedBackward.new_leaf(optimizer, weight), subspace.projection)
    if layers:
        ProjectedBackward(optimizer, layers, reduce)
    return kept


def _why_not(weight: Tensor, owners: list[tuple[str, nn.Module]], optimizer: LowRankOptimizer) -> str | None:
    if optimizer.objects(weight).reads_gradient:
        return "its updates read the whole gradient"
    if not weight.requires_grad:
        return "it is not trained"
    if len(owners) != 1:
        return "several modules have it" if owners else "the model does not have it"
    ((name, layer),) = owners
    if not can_project(layer) or not name.endswith("weight") or getattr(layer, "weight", None) is not weight:
        return f"a {type(layer).__name__} is no plain linear layer"
    return None
