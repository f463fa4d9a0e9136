"""LDAdam (arXiv 2410.16103) as one update rule: the subspace moves in every update, and what is lost is fed back."""

import torch

from peft_pretraining.optim.rules.update_rule import UpdateRule
from peft_pretraining.optim.tensors.collectives import Collective
from peft_pretraining.optim.tensors.param_update import Direction
from peft_pretraining.optim.tensors.state_tensor import StateTensor


class LDAdam(UpdateRule):
    """Written for m <= n; taller matrices are transposed. Devices divide the longer side: moments of shape (r, long),
    and the basis, whole on all of them, is a sum over them."""

    betas = (0.908, 0.99)
    decays_first = True

    def __init__(self, rank, rho=0.908, error_feedback=True):
        self.rank, self.rho, self.error_feedback = rank, rho, error_feedback

    def declare_state(self, like, group, shard):
        (short, long), tall = sorted(shard.shape), shard.shape[0] > shard.shape[1]
        rank = min(self.rank, short)
        if shard.dim is not None and shard.dim != (0 if tall else 1):
            raise ValueError(f"ldadam divides the longer side of a matrix over devices, got {shard.dim}")
        own_long = like.shape[0 if tall else 1]
        divided = (None, None) if shard.dim is None else (1, long)
        moments = {key: StateTensor(like.new_zeros(rank, own_long), *divided) for key in ("exp_avg", "exp_avg_sq")}
        return {
            **moments,
            "basis": StateTensor(like.new_zeros(short, rank)),
            "error": StateTensor.like_gradient(torch.zeros_like(like), shard),
        }

    def directions(self, updates, group):
        beta1, _ = group["betas"]
        seen = [self.upright(update, update.low_rank_grad + update.state["error"]) for update in updates]  # A
        asked = []
        for update, a in zip(updates, seen, strict=True):
            old, t = update.state["basis"], update.k - 1
            if t == 0:
                asked.append(Collective(update.low_rank_grad + update.state["error"], update.shard, "whole"))
            else:
                b = self.rho * (old @ update.state["exp_avg"]) / (1 - beta1**t) + (1 - self.rho) * a
                asked.append(Collective(b @ (b.T @ old), update.shard))  # (short, r)
        answers = yield asked
        return [self.direction(*each, group) for each in zip(updates, seen, answers, strict=True)]

    def upright(self, update, matrix):
        return matrix.T if update.shard.shape[0] > update.shard.shape[1] else matrix

    def direction(self, update, a, answer, group):
        beta1, beta2 = group["betas"]
        state, t, k = update.state, update.k - 1, update.k
        m, v, old = state["exp_avg"], state["exp_avg_sq"], state["basis"].clone()
        if t == 0:
            new = torch.linalg.svd(self.upright(update, answer), full_matrices=False)[0][:, : old.shape[1]]
        else:
            new = torch.linalg.qr(answer)[0]
        turned = new.T @ old  # C (r, r), zero at first
        low = new.T @ a
        moved = turned @ m
        if self.error_feedback:
            error = a - new @ low + beta1 / (1 - beta1) * (old @ m - new @ moved)
            state["error"].copy_(self.upright(update, error))
        if t > 0:
            spread = v / (1 - beta2**t) - (m / (1 - beta1**t)).square()
            v.copy_((1 - beta2**t) * (turned.square() @ spread + (moved / (1 - beta1**t)).square()).abs())
        m.copy_(beta1 * moved + (1 - beta1) * low)
        v.lerp_(low.square(), 1 - beta2)
        state["basis"].copy_(new)
        found = new @ ((m / (1 - beta1**k)) / ((v / (1 - beta2**k)).sqrt() + group["eps"]))
        return Direction(self.upright(update, found), update.rate)
