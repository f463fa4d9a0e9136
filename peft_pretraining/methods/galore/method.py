"""GaLore: the gradients of the linear layers are projected onto their own top singular vectors (arXiv 2403.03507).

For a weight W (m, n) with m <= n, at update t (algorithm 2):

    if t % update_proj_gap == 0:  P = first r left singular vectors of G      (m, r)   optim/basis/svd_basis.py
    R = Pᵀ G                                                                  (r, n)   optim/tensors/projection.py
    D = AdamW's direction for R, with moments of R's shape                    (r, n)   optim/rules/adamw.py
    W <- W - lr * scale * P D                                                 (m, n)   optim/moving.py

and from the right, R = G Qᵀ, if m > n. The moments are kept as they are when the basis changes.
"""

from __future__ import annotations

from peft_pretraining.methods._projection.method import GradientProjection


class GaLore(GradientProjection):
    """`--proj_type` chooses the side: std reverse_std left right full."""
