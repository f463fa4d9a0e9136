"""FRUGAL (arXiv 2411.07837) as one update rule: Adam on a part of the coordinates, sign descent on the others."""

import torch

from peft_pretraining import rng
from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.param_update import Direction
from peft_pretraining.optim.tensors.state_tensor import StateTensor, counter


class Frugal(UpdateRule):
    """`space`: `blocks` (whole matrices of the group, whose moments come and go) or `columns`. The part changes every
    `gap` updates, and its moments begin anew. `given`: the columns of each refresh."""

    betas = (0.9, 0.999)
    decays_first = True

    def __init__(self, space="blocks", density=0.25, gap=200, given=(), seed=0):
        self.space, self.density, self.gap, self.given, self.seed = space, density, gap, given, seed
        if space == "blocks":
            self.intermittent = frozenset({"exp_avg", "exp_avg_sq"})

    def declare_state(self, like, group, shard):
        age = {"age": StateTensor(counter(0))}
        if self.space == "blocks":
            return age | {key: StateTensor.like_gradient(torch.zeros_like(like), shard) for key in self.intermittent}
        part = like[:, : int(self.density * like.shape[1])]
        return age | {
            key: StateTensor.like_gradient(torch.zeros_like(part), shard) for key in ("exp_avg", "exp_avg_sq")
        }

    def directions(self, updates, group):
        return [self.direction(update, group) for update in updates]

    def direction(self, update, group):
        state, grad = update.state, update.low_rank_grad
        if update.step % self.gap == 0:
            self.restart(update, group)
        state["age"] += 1
        found = grad.sign()
        if self.space == "columns":
            index = self.given[update.step // self.gap]
            found[:, index] = self.adam(state, grad[:, index], group)
        elif "exp_avg" in state:
            found = self.adam(state, grad, group)
        return Direction(found, update.rate)

    def restart(self, update, group):
        """The first update of a part: is this matrix one of the chosen?"""
        state, number, count = update.state, update.step // self.gap, len(group["params"])
        inside = True
        if self.space == "blocks":
            order = torch.randperm(count, generator=rng.generator(self.seed, "frugal blocks", number))
            inside = update.index in order[: round(self.density * count)].tolist()
        state["age"].zero_()
        for key in ("exp_avg", "exp_avg_sq"):
            if not inside:
                state.pop(key, None)
            elif key in state:
                state[key].zero_()
            else:
                state[key] = torch.zeros_like(update.low_rank_grad)

    def adam(self, state, grad, group):
        beta1, beta2 = group["betas"]
        k = int(state["age"])
        mean = state["exp_avg"].lerp_(grad, 1 - beta1) / (1 - beta1**k)
        square = state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2) / (1 - beta2**k)
        return mean / (square.sqrt() + group["eps"])
