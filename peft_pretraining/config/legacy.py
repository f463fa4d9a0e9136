"""The older code bases' spellings: which method a command asks for, what their flags mean here, and what is refused.

Here, and only here, `--use_peft`, `--Golore`, `--relora`, `--switch_lora`, `--optimizer galore_*` and the like are
mapped to a method's name and its settings. None of their flags is ignored silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_pretraining.flags import Flag, ParsedFlag, boolean, unsupported
from peft_pretraining.methods import METHODS

GROUP = "older code bases"

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
_FACTOR_METHODS = ("lora", "relora", "switchlora", "golore_adapter")
_SUBSPACE_DESCENT_TYPES = METHODS["online_subspace_descent"].values["proj_type"]


@dataclass(frozen=True)
class Selection:
    """What the selectors of a command come to."""

    method: str
    rule: str
    """The update rule."""
    per_layer: bool
    """`--optimizer` asks for updates in the backward pass."""


def choose(given: Mapping[str, ParsedFlag], problems: list[str]) -> Selection:
    """Method and update rule. Contradicting selectors are a problem that names both."""
    optimizer = given["optimizer"].value.lower() if "optimizer" in given else "adamw"  # `Adam` in any capitals
    family, rule, per_layer = _split_optimizer(optimizer, problems)
    proj_type = given["proj_type"].value if "proj_type" in given else "std"

    claims = _claims(given, family, optimizer, proj_type, problems)
    for method, why in claims[1:]:
        if method != claims[0][0]:
            problems.append(f"{claims[0][1]} asks for {claims[0][0]} but {why} asks for {method}: give one of them")
    method = claims[0][0] if claims else "full_rank"

    if method not in METHODS:
        problems.append(f"--method {method!r} is unknown; there is {', '.join(METHODS)}")
    elif rule not in METHODS[method].update_rules and rule in (*_PLAIN_RULES, *_PROJECTED_RULES):
        rules = ", ".join(METHODS[method].update_rules)
        problems.append(f"--optimizer {optimizer}: {method} goes with {rules} alone")
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


def _is_set(given: Mapping[str, ParsedFlag], name: str) -> bool:
    return name in given and bool(given[name].value)


def _claims(
    given: Mapping[str, ParsedFlag], family: str, optimizer: str, proj_type: str, problems: list[str]
) -> list[tuple[str, str]]:
    """Every (method, flag that asks for it), in the order in which messages name them."""
    claims = []
    adapter_form = _is_set(given, "use_peft") and _is_set(given, "Golore")
    if "method" in given:
        name = given["method"].value
        claims.append(("golore_adapter" if name == "golore" and adapter_form else name, f"--method {name}"))
    if _is_set(given, "switch_lora"):
        claims.append(("switchlora", "--switch_lora"))
    if _is_set(given, "Golore"):
        if adapter_form:
            claims.append(("golore_adapter", "--use_peft --Golore"))
        else:
            problems.append("--Golore needs --use_peft True (GoLore's optimizer form is --optimizer golore_adamw)")
    if _is_set(given, "enable_golore"):
        claims.append(("golore_adapter", "--enable_golore"))
    if _is_set(given, "Relora") or _is_set(given, "relora"):
        why = "--Relora" if _is_set(given, "Relora") else f"--relora {given['relora'].value}"
        claims.append(("relora", why))
    wants_factors = _is_set(given, "use_peft") or _is_set(given, "use_lora")
    if wants_factors and not any(method in _FACTOR_METHODS for method, _ in claims):
        claims.append(("lora", "--use_peft" if _is_set(given, "use_peft") else "--use_lora"))

    subspace_descent = proj_type in _SUBSPACE_DESCENT_TYPES
    if _is_set(given, "enable_galore"):
        claims.append(("online_subspace_descent" if subspace_descent else "galore", "--enable_galore"))
    if family == "galore" and subspace_descent:
        claims.append(("online_subspace_descent", f"--optimizer {optimizer} --proj_type {proj_type}"))
    elif family:
        claims.append((family, f"--optimizer {optimizer}"))
    elif subspace_descent and claims and claims[0][0] == "galore":
        claims.append(("online_subspace_descent", f"--proj_type {proj_type}"))
    return claims


def translate(
    given: Mapping[str, ParsedFlag], chosen: Selection, defaults: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """What older spellings say of settings that have another name here.

    Returns defaults over `defaults`, and which of `given` were read for them.
    """
    method = chosen.method
    found: dict[str, Any] = {}
    read: set[str] = set()
    if "scale" in given and given["scale"].spelling == "galore_scale":
        found["clip_grad_norm"] = 0.0  # the code base with that spelling did not clip unless told to
    if method == "lora" and _is_set(given, "use_lora"):
        found |= {"lora_alpha": 1.0, "init_lora_type": "switchlora"}
    if method in ("switchlora", "lora") and (_is_set(given, "use_lora") or _is_set(given, "switch_lora")):
        found |= {"warmup_steps": 100, "min_lr_ratio": 0.0}
    if method == "full_rank" and chosen.rule == "sgd" and "beta1" in given:
        found["momentum"] = given["beta1"].value  # what the older scripts call it
        read.add("beta1")
    if method == "relora":
        relora, used = _relora(given, defaults, problems)
        found, read = found | relora, read | used
    return found, read


def _relora(
    given: Mapping[str, ParsedFlag], defaults: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """ReLoRA merges every `--update_proj_gap`, where nothing else says when; GoLore's spelling has its scale, too."""

    def value(name: str, otherwise: Any) -> Any:
        return given[name].value if name in given else defaults.get(name, otherwise)

    found, read = {}, set()
    if not _is_set(given, "relora") and (_is_set(given, "Relora") or "update_proj_gap" in given):
        found["relora"] = value("update_proj_gap", 200)
        read.add("update_proj_gap")
    if _is_set(given, "Relora"):
        read.add("scale")
        if "scale" in given and "lora_alpha" in given:
            problems.append("--scale and --lora_alpha both set ReLoRA's scale: give one of them")
        elif "lora_alpha" not in given:
            found["lora_alpha"] = value("scale", 1.0) * value("rank", 128)
    return found, read


REFUSED: dict[str, str] = {
    "megatron_dataset_config": "Megatron datasets are out of scope; pre-tokenise and pass --dataset_path",
    "plot_rank": "singular values of the updates are not built yet",
    "change_lora_lr": "the older scripts ignored it; --lora_plus_ratio and --dense_lr_ratio set rates apart",
    "no_lora_lr_ratio": "the older scripts ignored it; --lora_plus_ratio and --dense_lr_ratio set rates apart",
    "zero_all_state": "it failed in the older script, or was ignored; a switch resets its counterpart's state alone",
    "add_weighted_rank": "the older scripts ignored it",
    "adjust_lora_schedule": "the older scripts ignored it in pre-training",
    "lora_scheduler": "the older scripts ignored it in pre-training",
    "log_details": "per-layer logging is not built yet",
    "compress": "gradient compression is not built yet",
}
"""Flag -> why it is refused."""

ONE_VALUE: dict[str, tuple[str, str]] = {
    "use_hf_model": ("True", "the model is always transformers' LlamaForCausalLM"),
    "load_optimizer_state_on_resume": ("True", "for weights without optimizer state use --warmed_up_model"),
}
"""Flag -> the only value that is accepted (it is the behaviour anyway), and why no other is."""


def unsupported_flags() -> list[Flag]:
    only = [Flag(name, unsupported.anything, f"only {value}: {why}") for name, (value, why) in ONE_VALUE.items()]
    return [dataclasses.replace(flag, group=GROUP) for flag in (*unsupported.refused_flags(REFUSED), *only)]


def check_unsupported(given: Mapping[str, ParsedFlag], problems: list[str]) -> None:
    """Refuse what cannot be done."""
    unsupported.check_refused(given, REFUSED, problems)
    for name, (only, why) in ONE_VALUE.items():
        if name in given and given[name].value.lower() not in ("", only.lower()):
            problems.append(f"--{given[name].spelling} {given[name].value}: must be {only}; {why}")


ZEROTH_ORDER = "zeroth-order training is out of scope"
FORWARD_GRADIENTS = "training with forward-mode gradients is out of scope"
_OPTION_TASKS_REASONS: dict[str, tuple[str, ...]] = {
    "prefix tuning is out of scope": ("prefix_tuning", "num_prefix", "no_reparam", "prefix_init_by_real_act"),
    "prompt tuning is out of scope": ("prompt_tuning", "num_virtual_tokens", "prompt_init_by_real_tokens"),
    "training a part of the model is out of scope": ("linear_probing", "lp_early_stopping", "head_tuning", "untie_emb"),
    ZEROTH_ORDER: (
        *("zo_eps", "perturbation_mode", "q", "gradient_sparsity", "sparse_gradient_resample_steps"),
        *("sparse_gradient_group", "module_wise_perturbation", "perturbed_module_level", "coordinate_perturbation"),
    ),
    "tasks whose answers are generated are out of scope": (
        *("non_diff", "sampling", "temperature", "num_beams", "top_k", "top_p", "max_new_tokens", "eos_token"),
    ),
    "weights in 8 bits cannot be trained": ("load_int8",),
    "use --method lora, with --rank and --lora_alpha": ("lora",),
    "run once for each --train_set_seed": ("num_train_sets",),
    "there is one template for each task": ("template_ver",),
}
OPTION_TASKS_REFUSED: dict[str, str] = {name: why for why, names in _OPTION_TASKS_REASONS.items() for name in names}
"""Flag of the older script for option tasks -> why it is refused."""

OPTION_TASKS_PASSED_OVER: dict[str, str] = {
    "no_auto_device": "the model is on one device",
    "verbose": "see --save_predictions",
    "tag": "use --run_name",
    "save_on_interrupt": "the same command goes on from the newest checkpoint",
    "clean_model_at_end": "--save_total_limit says how many checkpoints are kept",
}
"""Flag of that script -> why it is passed over, with a warning."""
