"""Flags of older launch scripts that this code base understands but does not (or not yet) act on.

They are parsed so that an old command is understood as a whole. None is ignored silently: a setting of a method that
was not chosen is named in one warning as having no effect; a part that is not built, or is out of scope, is refused.
"""

from __future__ import annotations

from peft_pretraining.flags import Flag, Given

_OFF = ("False", "false")


def _anything(text: str) -> str:
    return text


_anything.value_is_optional = True

METHOD_SETTINGS: dict[str, str] = {
    name: owner
    for owner, names in {
        "lora": "lora_alpha lora_dropout lora_plus_ratio lora_only quantize use_double_quant init_lora_type",
        "relora": "reset_optimizer_on_relora optimizer_random_pruning optimizer_magnitude_pruning train_scaling "
        "force_keep_original",
        "switchlora": "switch_lora_interval switch_lora_descent_rate switch_descend_type fix_switch_lora_interval "
        "adam_warm_step remain_switch_state remain_switch_step_state zero_switch_state zero_switch_step_state "
        "zero_all_state zero_init_B force_disable_candidates switch_lora_drop discontinuous_switch "
        "no_offload_candidates cal_delta_norm check_rank_sync",
    }.items()
    for name in names.split()
}
"""Setting -> what reads it. Without effect unless that is chosen, which for now is refused by name."""

REFUSED: dict[str, str] = {
    "megatron_dataset_config": "Megatron datasets are out of scope; pre-tokenise and pass --dataset_path",
    "plot_rank": "singular values of the updates are not built yet",
    "change_lora_lr": "the older scripts ignored it; learning rates of adapters alone are not built yet",
    "no_lora_lr_ratio": "the older scripts ignored it; learning rates of adapters alone are not built yet",
    "add_weighted_rank": "the older scripts ignored it",
    "adjust_lora_schedule": "the older scripts ignored it in pre-training",
    "lora_scheduler": "the older scripts ignored it in pre-training",
    "log_details": "per-layer logging is not built yet",
    "compress": "gradient compression is not built yet",
    "reduce_low_rank": "low-rank gradient reduction is not built yet",
    "reshard_after_forward": "FSDP2 is not built yet",
    "replicas": "FSDP2 is not built yet",
    "async_save": "asynchronous checkpoints are not built yet",
    "step_timeout": "the watchdog is not built yet",
    "skip_spikes": "the watchdog is not built yet",
}
"""Flag -> why it is refused."""

ONE_VALUE: dict[str, tuple[str, str]] = {
    "use_hf_model": ("True", "the model is always transformers' LlamaForCausalLM"),
    "load_optimizer_state_on_resume": ("True", "for weights without optimizer state use --warmed_up_model"),
    "distributed_type": ("ddp", "FSDP2 is not built yet"),
}
"""Flag -> the only value that is accepted (it is the behaviour anyway), and why no other is."""


def planned_flags() -> list[Flag]:
    flags = [Flag(name, _anything, f"setting of {owner} (planned)") for name, owner in METHOD_SETTINGS.items()]
    flags += [Flag(name, _anything, f"refused: {why}") for name, why in REFUSED.items()]
    flags += [Flag(name, _anything, f"only {value}: {why}") for name, (value, why) in ONE_VALUE.items()]
    return flags


def check_planned(given: dict[str, Given], problems: list[str]) -> None:
    """Refuse what cannot be done; settings of methods that are not chosen are `cli`'s to warn about."""
    for name, why in REFUSED.items():
        if name in given and given[name].value not in _OFF:
            problems.append(f"--{given[name].spelling}: {why}")
    for name, (only, why) in ONE_VALUE.items():
        if name in given and given[name].value.lower() not in ("", only.lower()):
            problems.append(f"--{given[name].spelling} {given[name].value}: must be {only}; {why}")
