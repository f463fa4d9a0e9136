"""Online Subspace Descent: bases are learnt along with the weights, with no SVD but the first (arXiv 2408.12857).

At every update, with Ĝ = G / ‖G‖ and the basis Q (r, n) of a weight with m >= n (algorithm 1):

    R = G Qᵀ, direction D from R, W <- W - lr * scale * D Q       as in GaLore, in the current basis
    Q <- Q - (lr_t / lr / update_proj_gap) * direction of ∇‖Ĝ QᵀQ - Ĝ‖²       optim/basis/online_pca.py
"""

from __future__ import annotations

from peft_pretraining.methods._projection.method import GradientProjection


class OnlineSubspaceDescent(GradientProjection):
    """`--proj_type` chooses the basis' own optimizer: continuous (AdamW), continuous_adam8bit, continuous_lion,
    continuous_adafactor, continuous_sgd; or, as an ablation, `random` bases at each refresh."""
