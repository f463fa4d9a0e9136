"""SOAP (arXiv 2409.11321) as one update rule: Adam in the eigenbasis of Shampoo's Gram matrices."""

import torch

from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.collectives import Collective
from peft_pretraining.optim.tensors.param_update import Direction
from peft_pretraining.optim.tensors.state_tensor import StateTensor


class Soap(UpdateRule):
    """Devices put the gradient together and keep all of the state: an owner per matrix would be the next step.

    `first`: the first eigenvectors of both sides, where they are given.
    """

    betas = (0.95, 0.95)

    def __init__(self, gap=10, first=None):
        self.gap, self.first = gap, first

    def declare_state(self, like, group, shard):
        m, n = shard.shape
        shapes = {"exp_avg": (m, n), "exp_avg_sq": (m, n), "gram_0": (m, m), "gram_1": (n, n)}
        shapes |= {"vectors_0": (m, m), "vectors_1": (n, n)}
        return {key: StateTensor(like.new_zeros(shape)) for key, shape in shapes.items()}

    def directions(self, updates, group):
        grads = yield [Collective(update.low_rank_grad, update.shard, "whole") for update in updates]
        return [self.direction(*each, group) for each in zip(updates, grads, strict=True)]

    def direction(self, update, grad, group):
        beta1, beta2 = group["betas"]
        state, k = update.state, update.k - 1
        sides = [state["vectors_0"], state["vectors_1"]]
        direction = None
        if k > 0:
            rotated = sides[0].T @ grad @ sides[1]
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].lerp_(rotated.square(), 1 - beta2)
            moment = sides[0].T @ state["exp_avg"] @ sides[1]
            found = sides[0] @ (moment / (state["exp_avg_sq"].sqrt() + group["eps"])) @ sides[1].T
            correction = (1 - beta2**k) ** 0.5 / (1 - beta1**k)
            part = update.shard.part(found, update.shard.dim or 0)
            direction = Direction(part, update.rate * correction)
        for side, gram in enumerate((grad @ grad.T, grad.T @ grad)):
            state[f"gram_{side}"].lerp_(gram, 1 - beta2)
            if k == 0:
                first = self.first or [torch.linalg.eigh(state[f"gram_{axis}"])[1].flip(1) for axis in (0, 1)]
                sides[side].copy_(first[side])
            elif k % self.gap == 0:
                self.turn(state, side, sides[side])
        return direction

    def turn(self, state, side, vectors):
        """One step of power iteration, with the columns (and the second moment's entries) in falling order."""
        gram = state[f"gram_{side}"]
        order = (vectors * (gram @ vectors)).sum(0).argsort(descending=True, stable=True)
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].index_select(side, order))
        vectors.copy_(torch.linalg.qr(gram @ vectors[:, order])[0])
