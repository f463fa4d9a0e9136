"""Settings of the methods whose gradients are projected, and what there is to check about them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import (
    Allows,
    Condition,
    MethodSettings,
    MethodSpec,
    ParsedFlag,
    boolean,
    choice,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    setting,
)
from peft_pretraining.methods._low_rank.settings import LowRankSettings, TargetSettings

if TYPE_CHECKING:
    from peft_pretraining.config import Config

SVD_METHODS = ("auto", "gram", "subspace", "exact", "randomized")
PROJECTION_TYPES = ("std", "reverse_std", "left", "right", "full")
ONLINE_TYPES = (
    "continuous",
    "continuous_adam8bit",
    "continuous_lion",
    "continuous_adafactor",
    "continuous_sgd",
)
SUBSPACE_DESCENT_TYPES = ("random", *ONLINE_TYPES)


@dataclass(frozen=True)
class ScaleSettings(MethodSettings):
    scale: float = setting(1.0, positive_float, "factor of the low-rank update", ("galore_scale",))


@dataclass(frozen=True)
class GapSettings(MethodSettings):
    """When a basis, or a random projection, is replaced."""

    update_proj_gap: int = setting(200, non_negative_int, "updates between two refreshes; 0 keeps the first basis")


@dataclass(frozen=True)
class RefreshSettings(ScaleSettings, GapSettings):
    pass


@dataclass(frozen=True)
class SVDSettings(RefreshSettings):
    """Where bases come from that are made of gradients."""

    svd_method: str = setting(
        "auto",
        choice(*SVD_METHODS),
        f"how bases are computed: {', '.join(SVD_METHODS)}; auto: gram below a shorter side of 256, subspace above",
    )
    stagger_refresh: bool | None = setting(
        None, boolean, "spread the layers' refreshes over --update_proj_gap (default: with --per_layer)"
    )
    refresh_accumulation: int = setting(
        1, positive_int, "total batches whose mean gradient an SVD sees; the update sees its own"
    )


@dataclass(frozen=True)
class BasisSettings(SVDSettings):
    """Of methods for which the projected gradient is enough."""

    clip_norm: str = setting(
        "projected", choice("projected", "full"), "norm used for clipping: of projected gradients, or of full ones"
    )


@dataclass(frozen=True)
class RandomBasisSettings(MethodSettings):
    rand_ratio: float = setting(
        2.0, non_negative_float, "golore: share of --num_training_steps after which bases are random; above 1 never"
    )


@dataclass(frozen=True)
class PerLayerSettings(TargetSettings):
    per_layer: bool = setting(False, boolean, "update each parameter in the backward pass and free its gradient")


@dataclass(frozen=True)
class SideSettings(LowRankSettings, PerLayerSettings):
    """Which side is projected, and when weights move."""

    proj_type: str = setting(
        "std",
        choice(*PROJECTION_TYPES, *SUBSPACE_DESCENT_TYPES),
        f"side of the projection: {', '.join(PROJECTION_TYPES)}; kind of online_subspace_descent: "
        f"{', '.join(SUBSPACE_DESCENT_TYPES)}",
        identity=True,
    )


@dataclass(frozen=True)
class ProjectionSettings(SideSettings, BasisSettings):
    """Of methods that need nothing of a gradient but what the projection leaves of it."""

    projected_backward: str = setting(
        "auto",
        choice("auto", "on", "off"),
        "let the backward pass return projected gradients and form no full ones between refreshes; auto: in new runs "
        "that allow it",
    )


@dataclass(frozen=True)
class LimiterSettings(MethodSettings):
    """Of methods whose steps may grow by so much (optim/rules/limiter.py)."""

    norm_growth: float = setting(
        1.01, positive_float, "largest factor by which the norm of a matrix's step may grow from one update to the next"
    )


def _reads_gradients(config: Config) -> bool:
    """Whether any basis comes from gradients."""
    method = config.method
    return getattr(method, "proj_type", "std") != "random" and getattr(method, "rand_ratio", 1.0) > 0


CONDITIONS = (
    Condition(("refresh_accumulation",), _reads_gradients, "for random bases"),
    Condition(  # the older `--proj_type random` takes singular vectors of random matrices
        ("svd_method",),
        lambda c: _reads_gradients(c) or getattr(c.method, "proj_type", "std") == "random",
        "for random bases",
    ),
    Condition(
        ("stagger_refresh",),
        lambda c: c.method.update_proj_gap > 1 or c.per_layer,
        "where all layers are due together",
    ),
)
RANDOM_CONDITIONS = (
    Condition(
        ("rand_ratio",),
        lambda c: c.method.update_proj_gap != 0 or c.method.rand_ratio == 0,
        "beside a first basis that is kept for good",
    ),
)


def resolve(config: Config, given: Mapping[str, ParsedFlag]) -> Config:
    """Refreshes are spread where gradients are freed one by one: otherwise all are kept for the refresh."""
    unset = getattr(config.method, "stagger_refresh", False) is None
    return config.replace(stagger_refresh=config.per_layer) if unset else config


def for_device(config: Config, device_type: str) -> dict[str, str]:
    """Whether the backward pass projects, where that is left open."""
    asked = config.method.projected_backward
    return {"projected_backward": ("off" if why_not_projected(config) else "on") if asked == "auto" else asked}


def why_not_projected(config: Config) -> str | None:
    """Why the backward pass cannot return R alone, in words; None where it can."""
    method = config.method
    if method.proj_type not in PROJECTION_TYPES:
        return f"method {method.method} reads full gradients"
    if method.clip_norm == "full":
        return "--clip_norm full needs the norm of full gradients"
    return None


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    """What bases in 8 bits and updates in the backward pass cannot do."""
    method, accumulation = config.method, getattr(config.method, "refresh_accumulation", 1)
    if getattr(method, "projected_backward", "off") == "on" and (reason := why_not_projected(config)):
        problems.append(f"--projected_backward on: {reason}")
    if config.precision.basis_dtype == "int8" and getattr(method, "proj_type", "std") in ONLINE_TYPES:
        problems.append(
            f"--basis_dtype int8: with {method.proj_type} bases move in every update, by less than 8 bits can show"
        )
    if not method.per_layer:
        return
    if config.optimizer.skip_spikes > 0:
        problems.append(
            f"--skip_spikes {config.optimizer.skip_spikes:g} cannot go with per-layer updates, which are done "
            "before the gradient norm is known"
        )
    if accumulation > 1:
        problems.append(
            f"--refresh_accumulation {accumulation} needs full gradients of several batches, which "
            "per-layer updates never hold: leave one of the two out"
        )
    if config.optimizer.clip_grad_norm > 0 and getattr(method, "clip_norm", None) == "full":
        warnings.append("--clip_norm full: with per-layer updates every layer adds up its full gradient in float32")


def check_whole(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    """What methods cannot do whose steps need the whole gradient, and are limited in growth."""
    check(config, given, problems, warnings)
    check_whole_gradient(config, given, problems)
    growth = getattr(config.method, "norm_growth", 1.0)
    if growth < 1:
        problems.append(f"--norm_growth {growth:g}: must be at least 1, or every step is shorter than the one before")


def check_whole_gradient(config: Config, given: Mapping[str, ParsedFlag], problems: list[str]) -> None:
    """What is so for methods of steps or statistics of full rank: nothing less than G may be formed or reduced, and
    they compute in float32."""
    why = f"every update of {config.method.method} needs the whole gradient of every matrix"
    if config.distributed.reduce_low_rank:
        problems.append(f"--reduce_low_rank True: {why}, and projected gradients are less")
    if "projected_backward" in given and given["projected_backward"].value == "on":
        problems.append(f"--projected_backward on: {why}, which a projected backward pass never forms")
    _check_float32_state(config, problems)


def _check_float32_state(config: Config, problems: list[str]) -> None:
    """Second moments and running means in bfloat16 never fall; nothing asks for them here."""
    if config.precision.state_dtype == "published":
        problems.append(
            f"--state_dtype published: method {config.method.method} computes in float32, whatever its weights are in: "
            "float32 or weight"
        )


def check_random(config: Config, warnings: list[str]) -> None:
    if config.method.rand_ratio > 1:
        ratio = config.method.rand_ratio
        warnings.append(f"--rand_ratio {ratio:g} is above 1: bases will never be random (0.8 is usual)")


def check_fine_tuning(config: Config, problems: list[str]) -> None:
    if getattr(config.method, "projected_backward", "off") == "on":
        problems.append("--projected_backward on: fine-tuning takes the gradients that autograd leaves in the weights")
    accumulation = getattr(config.method, "refresh_accumulation", 1)
    if accumulation > 1:
        problems.append(f"--refresh_accumulation {accumulation}: fine-tuning has no further batches for a refresh")


FAMILY = MethodSpec(
    name="",
    title="",
    summary="",
    family="projected gradients",
    settings=ProjectionSettings,
    period="update_proj_gap",
    defaults={"adam_eps": 1e-6},
    values={"proj_type": PROJECTION_TYPES},
    update_rules=("adamw", "adamw8bit", "adafactor", "lion", "sgd"),
    state="mr + 2nr",
    allows=Allows(
        projected_gradient=True,
        per_layer=True,
        fsdp=True,
        fine_tuning=True,
        stochastic_rounding=True,
        stored_bases=True,
        tables=True,
        fp16=True,
    ),
    tiny={"rank": 4, "update_proj_gap": 2},
    conditions=CONDITIONS,
    resolve=resolve,
    check=check,
    check_fine_tuning=check_fine_tuning,
    for_device=for_device,
)
"""What is so for each of them, unless it says otherwise."""

ADAMW = ("adamw", "adamw8bit")
"""Update rules of methods that take nothing of AdamW but its direction, and so do not see how it keeps its moments."""

WHOLE = replace(
    FAMILY,
    family="whole gradients, projected moments",
    settings=SideSettings,
    defaults={"adam_eps": 1e-6, "state_dtype": "float32"},
    update_rules=("adamw",),
    allows=replace(FAMILY.allows, projected_gradient=False),
    conditions=(),
    for_device=None,
    check=check_whole,
)
"""What is so for methods that move a weight by its whole gradient, scaled by what happens in a projection."""
