"""Which method and update rule a command asks for: `--method`, or the selectors of older launch scripts.

Here, and only here, the older spellings (`--use_peft`, `--Golore`, `--relora`, `--switch_lora`, `--optimizer galore_*`,
...) are mapped to a method's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.config import PROJECTION_TYPES, SUBSPACE_DESCENT_TYPES
from peft_pretraining.config.factor_config import FACTOR_METHODS
from peft_pretraining.flags import Flag, Given, boolean
from peft_pretraining.methods import METHODS

SELECTORS = [
    Flag("use_peft", boolean, "older selector: low-rank factors (LoRA, or as --Relora, --relora, --Golore say)"),
    Flag("use_lora", boolean, "older selector: LoRA"),
    Flag("switch_lora", boolean, "older selector: SwitchLoRA"),
    Flag("Golore", boolean, "older selector, with --use_peft: GoLore's adapter form"),
    Flag("Relora", boolean, "older selector, with --use_peft: ReLoRA"),
]

FINETUNING_SELECTORS = [
    Flag("enable_galore", boolean, "older selector: GaLore; with --proj_type continuous* Online Subspace Descent"),
    Flag("enable_golore", boolean, "older selector: GoLore's adapter form"),
]

_PLAIN_RULES = ("adamw", "adam", "adamw8bit", "adam8bit", "adam_zero", "sgd", "adafactor", "lion")
_PROJECTED_RULES = ("adamw", "adamw8bit", "adafactor", "lion", "sgd")
_RANDOM_PROJECTED_RULES = ("adamw", "adamw8bit", "sgd")


@dataclass(frozen=True)
class Selection:
    """What the selectors of a command come to."""

    method: str
    rule: str
    """The update rule."""
    per_layer: bool
    """`--optimizer` asks for updates in the backward pass."""


def choose(given: dict[str, Given], problems: list[str]) -> Selection:
    """Method and update rule. Contradicting selectors are a problem that names both."""
    optimizer = given["optimizer"].value.lower() if "optimizer" in given else "adamw"  # `Adam` in any capitals
    family, rule, per_layer = _split_optimizer(optimizer, problems)
    proj_type = given["proj_type"].value if "proj_type" in given else "std"
    _check_proj_type(proj_type, problems)

    claims = _claims(given, family, optimizer, proj_type, problems)
    for method, why in claims[1:]:
        if method != claims[0][0]:
            problems.append(f"{claims[0][1]} asks for {claims[0][0]} but {why} asks for {method}: give one of them")
    method = claims[0][0] if claims else "full_rank"

    if method not in METHODS:
        problems.append(f"--method {method!r} is unknown; there is {', '.join(METHODS)}")
    elif rule not in METHODS[method].optimizers and rule in (*_PLAIN_RULES, *_PROJECTED_RULES):
        built = ", ".join(METHODS[method].optimizers)
        problems.append(f"--optimizer {optimizer}: update rule {rule} is not built yet for {method}; there is {built}")
    if "proj_type" in given and method in ("online_subspace_descent", "golore"):
        kinds = SUBSPACE_DESCENT_TYPES if method == "online_subspace_descent" else PROJECTION_TYPES
        if proj_type in (*PROJECTION_TYPES, *SUBSPACE_DESCENT_TYPES) and proj_type not in kinds:
            problems.append(f"--proj_type {proj_type}: {method} has {', '.join(kinds)}")
    return Selection(method, rule, per_layer)


def _split_optimizer(optimizer: str, problems: list[str]) -> tuple[str, str, bool]:
    """`galore_adamw8bit_per_layer` -> ("galore", "adamw8bit", True)."""
    per_layer = optimizer.endswith("_per_layer")
    stem = optimizer.removesuffix("_per_layer")
    for family, rules in (("galore", _PROJECTED_RULES), ("golore", _RANDOM_PROJECTED_RULES)):
        if stem.startswith(f"{family}_"):
            rule = stem.removeprefix(f"{family}_")
            if rule not in rules:
                known = ", ".join(f"{family}_{name}" for name in rules)
                problems.append(f"--optimizer {optimizer!r} is unknown; there is {known}")
                return family, "unknown", False
            return family, rule, per_layer
    if stem not in _PLAIN_RULES or per_layer:
        problems.append(
            f"--optimizer {optimizer!r} is unknown; there is {', '.join(_PLAIN_RULES)}, "
            f"galore_{{{','.join(_PROJECTED_RULES)}}} and golore_{{{','.join(_RANDOM_PROJECTED_RULES)}}}"
        )
        return "", "unknown", False
    # Plain Adam equals AdamW at weight decay 0, and the older scripts' `Adam` is torch's AdamW.
    return "", {"adam": "adamw", "adam8bit": "adamw8bit"}.get(stem, stem), False


def _check_proj_type(proj_type: str, problems: list[str]) -> None:
    known = (*PROJECTION_TYPES, *SUBSPACE_DESCENT_TYPES)
    if proj_type not in known:
        problems.append(f"--proj_type must be one of {', '.join(known)}, got {proj_type!r}")


def _claims(
    given: dict[str, Given], family: str, optimizer: str, proj_type: str, problems: list[str]
) -> list[tuple[str, str]]:
    """Every (method, flag that asks for it), in the order in which messages name them."""

    def is_set(name: str) -> bool:
        return name in given and bool(given[name].value)

    claims = []
    adapter_form = is_set("use_peft") and is_set("Golore")
    if "method" in given:
        name = given["method"].value
        claims.append(("golore_adapter" if name == "golore" and adapter_form else name, f"--method {name}"))
    if is_set("switch_lora"):
        claims.append(("switchlora", "--switch_lora"))
    if is_set("Golore"):
        if adapter_form:
            claims.append(("golore_adapter", "--use_peft --Golore"))
        else:
            problems.append("--Golore needs --use_peft True (GoLore's optimizer form is --optimizer golore_adamw)")
    if is_set("enable_golore"):
        claims.append(("golore_adapter", "--enable_golore"))
    if is_set("Relora") or is_set("relora"):
        claims.append(("relora", "--Relora" if is_set("Relora") else f"--relora {given['relora'].value}"))
    if (is_set("use_peft") or is_set("use_lora")) and not any(method in FACTOR_METHODS for method, _ in claims):
        claims.append(("lora", "--use_peft" if is_set("use_peft") else "--use_lora"))

    subspace_descent = proj_type in SUBSPACE_DESCENT_TYPES
    if is_set("enable_galore"):
        claims.append(("online_subspace_descent" if subspace_descent else "galore", "--enable_galore"))
    if family == "galore" and subspace_descent:
        claims.append(("online_subspace_descent", f"--optimizer {optimizer} --proj_type {proj_type}"))
    elif family:
        claims.append((family, f"--optimizer {optimizer}"))
    elif subspace_descent and claims and claims[0][0] == "galore":
        claims.append(("online_subspace_descent", f"--proj_type {proj_type}"))
    return claims
