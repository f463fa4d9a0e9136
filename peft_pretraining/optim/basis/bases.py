"""Basis rules: where the subspaces come from in which gradients are seen, and when they change.

| `proj_type` | `basis` | rule |
|---|---|---|
| `std reverse_std left right full` | `svd` | `SVDBasis` (GaLore) |
| with a `rand_ratio` | `svd_then_random` | `SVDThenRandom` (GoLore) |
| `random` | `gaussian` | `GaussianBasis` (Online Subspace Descent's ablation) |
| `continuous*` | `online_pca` | `OnlinePCA` (Online Subspace Descent) |

A group with a `rank` and no `basis` has the rule of its `proj_type`; `basis` may also be `random` (`RandomBasis`), or
an object.
"""

from __future__ import annotations

from typing import Any

from peft_pretraining.optim.basis.basis_rule import BasisRule, Refresh
from peft_pretraining.optim.basis.online_pca import BASIS_OPTIMIZERS, OnlinePCA
from peft_pretraining.optim.basis.reconstruction import reconstruction_gradient
from peft_pretraining.optim.basis.svd_basis import GaussianBasis, RandomBasis, SVDBasis, SVDThenRandom, check_method
from peft_pretraining.optim.tensors.projection import SIDES

__all__ = [
    "BASES",
    "BASIS_OPTIMIZERS",
    "PROJECTION_TYPES",
    "BasisRule",
    "GaussianBasis",
    "OnlinePCA",
    "RandomBasis",
    "Refresh",
    "SVDBasis",
    "SVDThenRandom",
    "basis_rule",
    "check_names",
    "reconstruction_gradient",
]

PROJECTION_TYPES = (*SIDES, "random", *BASIS_OPTIMIZERS)
BASES = ("svd", "random", "svd_then_random", "gaussian", "online_pca")


def check_names(group: dict[str, Any]) -> None:
    """Raises `ValueError` for a kind of projection or decomposition that does not exist."""
    if group["proj_type"] not in PROJECTION_TYPES:
        raise ValueError(f"proj_type must be one of {', '.join(PROJECTION_TYPES)}, got {group['proj_type']!r}")
    check_method(group["svd_method"])


def _name_of_basis(group: dict[str, Any]) -> str:
    """The rule that a group asks for, by `basis` or by the kind of projection."""
    proj_type, name = group["proj_type"], group.get("basis")
    if group["rand_ratio"] is not None and proj_type not in SIDES:
        raise ValueError(f"rand_ratio (GoLore) goes with proj_type {', '.join(SIDES)}, got {proj_type!r}")
    if name is None:
        by_type = "online_pca" if proj_type in BASIS_OPTIMIZERS else "gaussian" if proj_type == "random" else "svd"
        return "svd_then_random" if group["rand_ratio"] is not None else by_type
    if name not in BASES:
        raise ValueError(f"basis must be one of {', '.join(BASES)}, or an object, got {name!r}")
    return str(name)


def basis_rule(group: dict[str, Any]) -> BasisRule:
    """The rule that a parameter group with a rank asks for. Raises `ValueError` for settings that contradict."""
    check_names(group)
    if group["rank"] < 1:
        raise ValueError(f"rank must be at least 1, got {group['rank']}")
    if group["update_proj_gap"] < 0:
        raise ValueError(f"update_proj_gap must be at least 0, got {group['update_proj_gap']}")
    name, proj_type, svd_method = _name_of_basis(group), group["proj_type"], group["svd_method"]
    if name == "svd_then_random":
        return _svd_then_random(group)
    if name == "random":
        return RandomBasis()
    if name == "gaussian":
        return GaussianBasis(svd_method)
    if name == "svd":
        return SVDBasis(svd_method)
    proj_type = proj_type if proj_type in BASIS_OPTIMIZERS else "continuous"
    if group["update_proj_gap"] == 0:
        raise ValueError(f"update_proj_gap must not be 0 with {proj_type}: the basis learns at a rate of 1 / gap")
    return OnlinePCA(svd_method, proj_type)


def _svd_then_random(group: dict[str, Any]) -> SVDThenRandom:
    rand_ratio, steps = group["rand_ratio"], group["num_training_steps"]
    if rand_ratio is None:
        raise ValueError("rand_ratio must be a number with basis 'svd_then_random', got None")
    if steps is None and 0 < rand_ratio <= 1:
        raise ValueError(f"rand_ratio {rand_ratio} needs num_training_steps in the same group")
    return SVDThenRandom(group["svd_method"], rand_ratio, steps or 1)
