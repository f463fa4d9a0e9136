"""Flags of older launch scripts that this code base understands but does not (or not yet) act on.

They are parsed so that an old command is understood as a whole. None is ignored silently: what is not built, or is out
of scope, is refused with the reason.
"""

from __future__ import annotations

from peft_pretraining.flags import Flag, Given

_OFF = ("False", "false")


def _anything(text: str) -> str:
    return text


_anything.value_is_optional = True

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


def planned_flags() -> list[Flag]:
    flags = [Flag(name, _anything, f"refused: {why}", refused=True) for name, why in REFUSED.items()]
    flags += [Flag(name, _anything, f"only {value}: {why}") for name, (value, why) in ONE_VALUE.items()]
    return flags


def check_planned(given: dict[str, Given], problems: list[str]) -> None:
    """Refuse what cannot be done."""
    for name, why in REFUSED.items():
        if name in given and given[name].value not in _OFF:
            problems.append(f"--{given[name].spelling}: {why}")
    for name, (only, why) in ONE_VALUE.items():
        if name in given and given[name].value.lower() not in ("", only.lower()):
            problems.append(f"--{given[name].spelling} {given[name].value}: must be {only}; {why}")
