"""No setting is ignored unsaid: each is flipped, and either the run's numbers change, or a warning names it as without
effect (and then nothing changes), or it is refused."""

from __future__ import annotations

import dataclasses

import pytest
from flips import DERIVED, FLIPS, METHODS, OPERATIONAL, Runner, another, flipped, words

from peft_pretraining import methods
from peft_pretraining.config import config_flags
from peft_pretraining.config.sections import RoleConfig
from peft_pretraining.flags import (
    boolean,
    choice,
    comma_separated,
    fraction_below_one,
    non_negative_float,
    positive_int,
)

OF_METHODS = (
    *("rank", "scale", "update_proj_gap", "rand_ratio", "svd_method", "stagger_refresh", "refresh_accumulation"),
    *("per_layer", "target_modules", "clip_norm", "relora", "lora_alpha", "lora_dropout", "lora_plus_ratio"),
    *("dense_lr_ratio", "init_lora_type", "zero_init_B", "train_scaling", "lora_only", "quantize", "use_double_quant"),
    *("reset_optimizer_on_relora", "optimizer_random_pruning", "optimizer_magnitude_pruning", "switch_lora_interval"),
    *("switch_lora_descent_rate", "switch_descend_type", "fix_switch_lora_interval", "adam_warm_step"),
    *("remain_switch_state", "remain_switch_step_state", "switch_lora_drop", "discontinuous_switch", "cal_delta_norm"),
    *DERIVED,
)
OF_RULES = ("adam_beta1", "adam_beta2", "adam_eps", "beta1", "momentum", "dampening", "clip_grad_norm", "weight_decay")
OF_PRECISION = ("precision", "state_dtype", "basis_dtype", "gradient_sum_dtype")
OF_ROLES = tuple(item.name for item in dataclasses.fields(RoleConfig))
OF_SCHEDULES = ("warmup_steps", "min_lr_ratio", "cycle_length", "restart_warmup_steps", "adjust_step", "decay_steps",
                "decay_ratio", "decay_shape")  # fmt: skip

CONTEXTS = (
    *[(method, f"--optimizer {rule}", (*OF_RULES, *OF_ROLES)) for method, entry in methods.METHODS.items()
      for rule in entry.update_rules if rule not in ("adamw", "adam_zero")],
    *[("full_rank", f"--scheduler {name}", OF_SCHEDULES)
      for name in ("linear", "constant", "cosine_restarts", "cosine_with_min_lr")],
    *[("full_rank", f"--scheduler wsd {name}", OF_SCHEDULES) for name in ("--decay_ratio 0.7", "--decay_steps 4")],
    *[("full_rank", f"--precision {name}", ("state_dtype", "gradient_sum_dtype")) for name in ("bf16", "bf16_sr")],
    *[("galore", f"--precision {name}", OF_PRECISION[1:]) for name in ("mixed", "bf16", "bf16_sr")],
    ("galore", "--precision bf16 --per_layer --gradient_accumulation 2", OF_PRECISION[1:]),
    ("full_rank", "--precision bf16 --optimizer adam_zero", OF_PRECISION[1:]),
    *[("relora", f"--scheduler {name}", OF_SCHEDULES) for name in ("linear", "cosine_restarts")],
    ("full_rank", "--scheduler cosine_restarts --cycle_length 3 --restart_warmup_steps 2", OF_SCHEDULES),
    *[("online_subspace_descent", f"--proj_type {name}", OF_METHODS)
      for name in ("random", "continuous", "continuous_sgd")],
    *[("galore", f"--proj_type {name}", OF_METHODS) for name in ("full", "right")],
    ("galore", "--per_layer --stagger_refresh False --clip_grad_norm 0.01", OF_METHODS),
    ("galore", "--per_layer", OF_ROLES),
    ("full_rank", "--optimizer adam_zero", OF_ROLES),
    ("lora", "--adam_lr 0.004", ("dense_lr_ratio", *OF_ROLES)),
    ("lora", "--adam_lr 0.004 --train_scaling", ("dense_lr_ratio", *OF_ROLES)),
    ("golore_adapter", "--adam_lr 0.004", ("dense_lr_ratio", *OF_ROLES)),
    ("lora", "--lora_only", OF_ROLES),
    ("galore", "--update_proj_gap 0", OF_METHODS),
    ("galore", "--update_proj_gap 1", OF_METHODS),
    ("galore", "--clip_grad_norm 0", OF_METHODS),
    ("galore", "--optimizer galore_lion", OF_METHODS),
    ("golore", "--rand_ratio 0", OF_METHODS),
    ("golore_adapter", "--rand_ratio 0", OF_METHODS),
    ("golore_adapter", "--update_proj_gap 0", OF_METHODS),
    ("golore_adapter", "--clip_grad_norm 0", OF_METHODS),
    ("lora", "--lora_only", OF_METHODS),
    ("lora", "--use_lora --init_lora_type switchlora", OF_METHODS),
    ("lora", "--train_scaling", OF_METHODS),
    ("relora", "--Relora", OF_METHODS),
    ("relora", "--optimizer_random_pruning 0.3 --reset_optimizer_on_relora False", OF_METHODS),
    ("relora", "--init_lora_type switchlora", OF_METHODS),
    ("switchlora", "--fix_switch_lora_interval", OF_METHODS),
    ("switchlora", "--remain_switch_state", OF_METHODS),
    ("switchlora", "--adam_warm_step -1", OF_METHODS),
    ("switchlora", "--init_lora_type origin_lora", OF_METHODS),
)  # fmt: skip
"""(method, flags, what is flipped beside them)."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("flips"))


def check(run, method: str, flags: str, name: str) -> None:
    value = flipped(method, name)
    if f"--{name} " in f"{flags} ":
        return  # it is what the context sets
    before, after = run(words(method, flags)), run(words(method, flags, **{name: value}))
    assert before.numbers is not None, before.said
    if after.numbers is None:
        assert any(f"--{name}" in line for line in after.said), after.said
    elif after.says_without_effect(name):
        assert after.numbers == before.numbers, f"--{name} {value} acts, though it is said not to: {after.said}"
    else:
        assert after.numbers != before.numbers, f"--{name} {value} does nothing, unsaid"


def test_every_setting_is_flipped_or_operational():
    operational = [name for names in OPERATIONAL.values() for name in names]
    assert not set(operational) & set(FLIPS)
    unknown = {flag.name for flag in config_flags()} - set(operational) - set(FLIPS) - set(DERIVED)
    assert not unknown, unknown
    assert set(METHODS) == set(methods.METHODS)


@pytest.mark.parametrize(
    ("convert", "value", "other"),
    [
        (boolean, True, "False"),
        (choice("channel", "tensor"), "tensor", "channel"),
        (positive_int, 3, "4"),
        (fraction_below_one, 0.9, "0.45"),
        (non_negative_float, 0.0, "0.5"),
        (positive_int, None, "3"),
        (fraction_below_one, None, "0.5"),
    ],
)
def test_a_setting_of_a_new_method_needs_no_line(convert, value, other):
    assert another("new", convert, value) == other


def test_what_is_no_number_and_no_choice_needs_a_line():
    with pytest.raises(ValueError, match="needs a line in FLIPS"):
        another("pattern", comma_separated, ("mlp",))


@pytest.mark.parametrize("name", [name for name in FLIPS if name not in OF_METHODS])
def test_settings_of_every_run(run, name):
    check(run, "full_rank", "", name)


def settings_of(method: str) -> list[str]:
    """Those that can be flipped, of the method and of what it refuses."""
    spec = methods.METHODS[method]
    return [name for name in dict.fromkeys((*spec.own, *spec.refused)) if name in OF_METHODS]


_BY_METHOD = [
    *(
        (method, name)
        for method in ("galore", "relora", "switchlora", "golore_adapter")
        for name in settings_of(method)
    ),
    *((spec.name, name) for spec in methods.METHODS.values() for name in spec.own if name in DERIVED),
]
_FIRST_METHOD = {name: method for method, name in reversed(_BY_METHOD)}
_FAST = [
    *((method, name) for name, method in _FIRST_METHOD.items()),
    ("relora", "scale"),
    ("full_rank", "rank"),
    ("lora", "momentum"),
]
"""Each setting of any method in one of those that have it."""


@pytest.mark.parametrize(("method", "name"), _FAST)
def test_settings_of_a_method(run, method, name):
    check(run, method, "", name)


@pytest.mark.parametrize("method", [name for name in METHODS if "dense_lr_ratio" in methods.METHODS[name].own])
def test_a_ratio_beside_the_rate_that_takes_its_place(run, method):
    check(run, method, "--adam_lr 0.004", "dense_lr_ratio")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method(run, method):
    failed = {}
    for name in (*FLIPS, *DERIVED):
        try:
            check(run, method, "", name)
        except AssertionError as error:
            failed[name] = str(error).splitlines()[0]
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize(("method", "flags", "names"), CONTEXTS)
def test_settings_beside_others(run, method, flags, names):
    failed = {}
    for name in names:
        try:
            check(run, method, flags, name)
        except AssertionError as error:
            failed[name] = str(error).splitlines()[0]
    assert not failed
