"""APOLLO (arXiv 2412.05270) as one lift: the gradient, each channel as long as AdamW makes it in a projection."""

import math

import torch

from peft_pretraining.optim.basis.basis_rule import BasisRule
from peft_pretraining.optim.rules.lifts import Lift
from peft_pretraining.optim.tensors.collectives import Collective
from peft_pretraining.optim.tensors.projection import LEFT
from peft_pretraining.optim.tensors.state_tensor import StateTensor


class ScaledGradient(Lift):
    """W <- W - lr c_k √scale S, S = G with each channel (or, with `tensor`, the whole) times ‖N‖ / ‖R‖, and ‖S‖ growing
    by no more than a factor `gamma` an update."""

    reads_gradient = True

    def __init__(self, scale=1.0, granularity="channel", gamma=1.01):
        self.scale, self.granularity, self.gamma = scale, granularity, gamma

    def declare_state(self, weight, projection, group, shard):
        return {"limited_norm": StateTensor(weight.new_zeros(()))}  # 0: none yet

    def move(self, updates, group):
        asked = []
        for update in updates:
            correction, r = update.direction.bias_correction, update.low_rank_grad
            n = update.direction.tensor / correction  # (m, r) or (r, n); its sign does not matter
            if self.granularity == "channel":
                axis = 0 if update.projection.sides == (LEFT,) else 1
                factor = n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8)  # (1, n) or (m, 1)
                update.scaled = update.grad * factor
                asked.append(Collective(update.scaled.square().sum(), update.shard))
            else:
                asked += [Collective(part.square().sum(), update.low_rank_shard) for part in (n, r)]
                asked.append(Collective(update.grad.square().sum(), update.shard))
        sums = iter((yield asked))
        for update in updates:
            if self.granularity == "channel":
                scaled, norm = update.scaled, next(sums).sqrt()
            else:
                n, r, g = (next(sums).sqrt() for _ in range(3))
                scaled, norm = update.grad * (n / (r + 1e-8)), g * (n / (r + 1e-8))
            limit = self.limit(update.state["limited_norm"], norm)
            step = update.rate * update.direction.bias_correction * math.sqrt(self.scale)
            with update.moving() as weight:
                weight.sub_(scaled / limit * step)

    def limit(self, kept, norm):
        """What to divide by; `kept` becomes the norm of what is left. A zero gradient changes nothing."""
        growth = torch.where(kept > 0, norm / (kept + 1e-8), 1.0)
        limit = growth.clamp(min=self.gamma) / self.gamma
        kept.copy_(torch.where(norm > 0, norm / limit, kept))
        return limit


class GaussianProjection(BasisRule):
    """Entries from N(0, 1/r), or those that were given for each refresh."""

    def __init__(self, given=()):
        self.given = given

    def reads_gradient(self, step):
        return False

    def compute_basis(self, refresh):
        (side,) = refresh.projection.sides
        if self.given:
            return {side: self.given[refresh.number]}
        like = refresh.projection.new_bases(refresh.grad)[side]
        drawn = torch.randn(like.shape, generator=refresh.generator("projection"))
        return {side: drawn.to(like) / math.sqrt(refresh.projection.rank)}
