"""What DDP all-reduces in place of its buckets: projected gradients, float32 sums; overlapping the backward pass.

Saves traffic, not memory: DDP's buckets are as large as before. Called once an update, after accumulation (`no_sync`).
"""

# Without postponed annotations: DDP looks at those of its hooks.

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from peft_pretraining.distributed.wide_sums import WideSums


class LowRankReduction(Protocol):
    """What a training method says about its gradients."""

    def project(self, param: Tensor, grad: Tensor) -> Tensor | None:
        """R of this rank's gradient, or None where the whole gradient is needed. Alike on all ranks."""

    def receive(self, param: Tensor, low_rank_grad: Tensor) -> None:
        """The mean of R over the ranks. The parameter's `grad` is left unreduced, for nobody to read."""


def reduce_in_its_place(
    model: DistributedDataParallel, reduction: LowRankReduction | None, wide: WideSums | None
) -> None:
    """Let DDP reduce what `reduction` projects in low rank, and all other gradients as usual.

    With `wide` these are float32 sums over micro-batches, averaged in float32; the mean is rounded once.
    """

    @torch.no_grad()
    def hook(world_size: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        entries, parts = [], []
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            total = grad if wide is None else wide.total(param, grad)
            low = None if reduction is None else reduction.project(param, total)
            entries.append((param, grad, low))
            parts.append(total if low is None else low)
        packed = torch.cat([part.reshape(-1) for part in parts]).div_(world_size)

        @torch.no_grad()
        def unpack(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            means = future.value()[0].split([part.numel() for part in parts])
            for (param, grad, low), mean in zip(entries, means, strict=True):
                if low is None:
                    grad.copy_(mean.view_as(grad))
                elif reduction is not None:
                    reduction.receive(param, mean.view(low.shape))
            return bucket.buffer()

        return dist.all_reduce(packed, async_op=True).get_future().then(unpack)

    model.register_comm_hook(dist.get_world_size(), hook)
