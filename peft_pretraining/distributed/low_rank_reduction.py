"""All-reducing projected gradients instead of whole ones, in DDP's buckets and overlapping the backward pass.

Saves traffic, not memory: DDP's buckets are as large as before. Called once an update, after accumulation (`no_sync`).
"""

# Without postponed annotations: DDP looks at those of its hooks.

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class LowRankReduction(Protocol):
    """What a training method says about its gradients."""

    def project(self, param: Tensor, grad: Tensor) -> Tensor | None:
        """R of this rank's gradient, or None where the whole gradient is needed. Alike on all ranks."""

    def receive(self, param: Tensor, low_rank_grad: Tensor) -> None:
        """The mean of R over the ranks. The parameter's `grad` is left unreduced, for nobody to read."""


def reduce_low_rank(model: DistributedDataParallel, reduction: LowRankReduction) -> None:
    """Let DDP reduce what `reduction` projects in low rank, and all other gradients as usual."""

    @torch.no_grad()
    def hook(world_size: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        entries = [
            (param, grad, reduction.project(param, grad))
            for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]
        parts = [grad if low is None else low for _, grad, low in entries]
        packed = torch.cat([part.reshape(-1) for part in parts]).div_(world_size)

        @torch.no_grad()
        def unpack(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            means = future.value()[0].split([part.numel() for part in parts])
            for (param, grad, low), mean in zip(entries, means, strict=True):
                if low is None:
                    grad.copy_(mean.view_as(grad))
                else:
                    reduction.receive(param, mean.view(low.shape))
            return bucket.buffer()

        return dist.all_reduce(packed, async_op=True).get_future().then(unpack)

    model.register_comm_hook(dist.get_world_size(), hook)
