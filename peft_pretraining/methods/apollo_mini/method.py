"""APOLLO-Mini: APOLLO with one factor for each matrix, s = ‖N‖ / (‖R‖ + 1e-8), and a rank of 1 (arXiv 2412.05270).

W <- W - lr c_k √scale s G, with ‖s G‖ growing by no more than 1% an update; `methods/apollo/method.py` has the rest.
"""

from __future__ import annotations

from typing import Any

from peft_pretraining.methods.apollo.method import Apollo, ApolloTraining


class ApolloMiniTraining(ApolloTraining):
    granularity = "tensor"


class ApolloMini(Apollo):
    """APOLLO-Mini for other loops: `Apollo` with other defaults.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = ApolloMini([weight], lr=0.01)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> state = optimizer.state[weight]
    >>> tuple(state["exp_avg"].shape)
    (6, 1)
    """

    def __init__(
        self, params: Any, *, rank: int = 1, scale: float = 128.0, granularity: str = "tensor", **settings: Any
    ):
        super().__init__(params, rank=rank, scale=scale, granularity=granularity, **settings)
