from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_pretraining.flags import ParsedFlag
from peft_pretraining.methods._factors import settings as factors
from peft_pretraining.methods._projection import settings as projection

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@dataclass(frozen=True)
class GoLoreAdapterSettings(factors.FactorSettings, projection.BasisSettings, projection.RandomBasisSettings):
    pass


def check(config: Config, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    projection.check_random(config, warnings)
    if config.method.clip_norm == "full":
        problems.append("--clip_norm full: method golore_adapter never forms the full gradients of ordinary updates")
    if config.precision.basis_dtype != "auto":
        problems.append(
            f"--basis_dtype {config.precision.basis_dtype}: a basis of method golore_adapter is a factor of its "
            "layer, in the dtype of the weights"
        )


def check_sharding(config: Config, inputs: Mapping[str, int], devices: int) -> list[str]:
    """A trained factor that cannot be divided by columns is gathered when its moments move into a new basis: in 8 bits
    they cannot be."""
    uneven = {name: size for name, size in inputs.items() if size % devices and _is_target(config, name)}
    if config.optimizer.optimizer != "adamw8bit" or not uneven:
        return []
    name, size = next(iter(uneven.items()))
    return [
        f"--optimizer adamw8bit: --distributed_type fsdp cannot divide the {size} inputs of {name} evenly over "
        f"{devices} devices: use another number of them, --replicas, ddp, or adamw"
    ]


def _is_target(config: Config, name: str) -> bool:
    return any(target in name for target in config.method.target_modules)


SPEC = replace(
    factors.FAMILY,
    name="golore_adapter",
    title="GoLore, adapter form",
    paper="2410.11289",
    year=2024,
    summary="GoLore as factors: no full gradients between refreshes",
    settings=GoLoreAdapterSettings,
    defaults=projection.FAMILY.defaults,
    period=projection.FAMILY.period,
    refused={
        "lora_only": factors.CHANGES_FROZEN,
        "quantize": factors.QUANTISED_AGAIN,
        "lora_plus_ratio": "method {name} trains one factor of each layer, A or B by its shape, so there is no rate of "
        "B over that of A",
    },
    update_rules=("adamw", "adamw8bit", "sgd"),
    state="2nr",  # the basis is the factor that is not trained
    allows=replace(factors.FAMILY.allows, fp16=False),
    tiny={**projection.FAMILY.tiny, "rand_ratio": 0.5},
    identity=("scale",),
    conditions=(*factors.FAMILY.conditions, *projection.FAMILY.conditions, *projection.RANDOM_CONDITIONS),
    resolve=projection.resolve,
    check=check,
    check_sharding=check_sharding,
    check_fine_tuning=projection.check_fine_tuning,
)
