"""Gradient projection on the command line: every older name, what it comes to, what is refused, what has no effect."""

from __future__ import annotations

import pytest

from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError

GALORE_RULES = ("adamw", "adamw8bit", "adafactor", "lion", "sgd")
GOLORE_RULES = ("adamw", "adamw8bit", "sgd")
SIDES = ("std", "reverse_std", "left", "right", "full")
SUBSPACE_DESCENT = (
    *("random", "continuous", "continuous_adam8bit", "continuous_lion", "continuous_adafactor", "continuous_sgd"),
)
FULL_RANK = {  # --optimizer -> update rule
    **{name: name for name in ("adamw", "adamw8bit", "adafactor", "lion", "sgd", "adam_zero")},
    **{"adam": "adamw", "Adam": "adamw", "adam8bit": "adamw8bit"},
}


@pytest.fixture
def load(command):
    """A function: the launch of a small run with these flags added. Raises `ConfigError`."""
    return lambda text: cli.load([*command(), *text.split()], environ={})


@pytest.fixture
def problems(load):
    """A function: what is wrong with these flags."""

    def refused(text: str) -> list[str]:
        with pytest.raises(ConfigError) as error:
            load(text)
        return error.value.problems

    return refused


# Names.


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("rule", GALORE_RULES)
def test_every_older_name_of_galore_and_online_subspace_descent(load, rule, per_layer):
    for proj_type in (*SIDES, *SUBSPACE_DESCENT):
        launch = load(f"--optimizer galore_{rule}{'_per_layer' * per_layer} --proj_type {proj_type} --rank 4")
        method = "galore" if proj_type in SIDES else "online_subspace_descent"
        chosen, settings = launch.config.method, launch.config.optimizer
        assert (chosen.method, settings.optimizer, chosen.proj_type) == (method, rule, proj_type)
        assert (chosen.per_layer, chosen.stagger_refresh) == (per_layer, per_layer)
        assert (chosen.scale, chosen.update_proj_gap) == (1.0, 200)
        assert launch.config.settings().get("adam_eps", 1e-6) == 1e-6
        assert launch.warnings == ()
        # The plain way to say it.
        plain = f"--method {method} --optimizer {rule} --proj_type {proj_type} --rank 4 --per_layer {per_layer}"
        assert load(plain).config == launch.config


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("rule", GOLORE_RULES)
def test_every_older_name_of_golore(load, rule, per_layer):
    launch = load(f"--optimizer golore_{rule}{'_per_layer' * per_layer} --rand_ratio 0.8 --rank 4")
    chosen = launch.config.method
    assert (chosen.method, launch.config.optimizer.optimizer, chosen.rand_ratio) == ("golore", rule, 0.8)
    assert (chosen.per_layer, chosen.stagger_refresh, chosen.proj_type) == (per_layer, per_layer, "std")
    assert launch.config.settings().get("adam_eps", 1e-6) == 1e-6 and launch.warnings == ()
    plain = f"--method golore --optimizer {rule} --rand_ratio 0.8 --rank 4 --per_layer {per_layer}"
    assert load(plain).config == launch.config


@pytest.mark.parametrize("name", FULL_RANK)
def test_every_older_name_of_a_full_rank_run(load, name):
    launch = load(f"--optimizer {name}")
    assert (launch.config.method.method, launch.config.optimizer.optimizer) == ("full_rank", FULL_RANK[name])
    assert launch.config.settings().get("adam_eps", 1e-8) == 1e-8 and launch.warnings == ()


def test_rules_without_an_older_name_go_with_a_method(load):
    for method, rule in (("golore", "lion"), ("golore", "adafactor"), ("online_subspace_descent", "adam8bit")):
        chosen = load(f"--method {method} --optimizer {rule} --rand_ratio 0.5").config
        expected = {"adam8bit": "adamw8bit"}.get(rule, rule)
        assert (chosen.method.method, chosen.optimizer.optimizer) == (method, expected)


def of_bfloat16(warning: str) -> bool:
    """Whether it says what weights or states in bfloat16 cost."""
    return "--precision bf16 rounds weights to nearest" in warning or "second moments in bfloat16" in warning


def test_online_subspace_descent_as_in_its_launch_scripts(load):
    launch = load(
        "--lr 0.01 --galore_scale 0.25 --rank 128 --update_proj_gap 200 --weight_decay 0 --dtype bfloat16 "
        "--optimizer galore_adamw --proj_type continuous"
    )
    method = launch.config.method
    assert (method.method, method.proj_type, method.rank, method.update_proj_gap) == (
        *("online_subspace_descent", "continuous", 128, 200),
    )
    assert (method.scale, launch.config.optimizer.clip_grad_norm, method.per_layer) == (0.25, 0.0, False)
    assert launch.warnings and all(of_bfloat16(said) for said in launch.warnings)
    launch = load(
        "--lr 0.005 --galore_scale 0.25 --rank 1024 --update_proj_gap 500 --activation_checkpointing --weight_decay 0 "
        "--grad_clipping 1.0 --dtype bfloat16 --single_gpu --proj_type continuous_adam8bit "
        "--optimizer galore_adamw8bit_per_layer"
    )
    method, settings = launch.config.method, launch.config.optimizer
    assert (method.method, method.proj_type, settings.optimizer, method.per_layer) == (
        *("online_subspace_descent", "continuous_adam8bit", "adamw8bit", True),
    )
    assert (settings.clip_grad_norm, launch.config.run.single_gpu, launch.config.model.activation_checkpointing) == (
        *(1.0, True, True),
    )
    assert launch.warnings and all(of_bfloat16(said) for said in launch.warnings)


# Settings.


def test_the_momentum_of_sgd(load):
    def momentum(text):
        settings = load(text).config.rule
        return settings.momentum, settings.dampening

    assert momentum("--optimizer sgd") == momentum("--optimizer galore_sgd") == (0.9, 0.9)
    assert momentum("--optimizer sgd --beta1 0.5") == (0.5, 0.9)
    assert momentum("--optimizer sgd --beta1 0.5 --momentum 0.7 --dampening 0") == (0.7, 0)
    assert momentum("--optimizer galore_sgd --momentum 0 --dampening 1") == (0, 1)
    assert load("--optimizer adafactor --beta1 0.9").config.rule.beta1 == 0.9


def test_refreshes_are_staggered_with_per_layer_updates_unless_told_otherwise(load):
    def staggered(text):
        return load(f"--method galore {text}").config.method.stagger_refresh

    assert not staggered("") and staggered("--per_layer") and staggered("--stagger_refresh")
    assert not staggered("--per_layer --stagger_refresh False")


@pytest.mark.parametrize("text", ["--update_proj_gap 0", "--svd_method exact", "--svd_method randomized"])
def test_settings_of_the_basis(load, text):
    for family in ("galore", "golore"):
        launch = load(f"--optimizer {family}_adamw --rand_ratio 0.8 {text}")
        assert str(launch.config.settings()[text.split()[0][2:]]) == text.split()[1]
        assert not any("update_proj_gap" in warning or "svd_method" in warning for warning in launch.warnings)


# What is refused.


@pytest.mark.parametrize(
    "text, parts",
    [
        ("--method galore --proj_type continuous", ["--method galore", "--proj_type continuous"]),
        ("--method galore --optimizer galore_adamw --proj_type random", ["--method galore", "--proj_type random"]),
        ("--method golore --proj_type continuous", ["--proj_type continuous: golore has std"]),
        ("--optimizer golore_adamw --proj_type random", ["--proj_type random: golore has std"]),
        ("--method online_subspace_descent --proj_type left", ["--proj_type left: online_subspace_descent has random"]),
        ("--method galore --optimizer golore_sgd", ["--method galore", "--optimizer golore_sgd"]),
        ("--method golore --optimizer galore_sgd", ["--method golore", "--optimizer galore_sgd"]),
        ("--method full_rank --optimizer golore_adamw", ["--method full_rank", "--optimizer golore_adamw"]),
        ("--use_peft --Golore --optimizer golore_adamw", ["golore_adapter", "--optimizer golore_adamw"]),
        (
            "--optimizer galore_sgd_per_layer --per_layer False",
            ["--optimizer galore_sgd_per_layer", "--per_layer False"],
        ),
        ("--method galore --per_layer --refresh_accumulation 2", ["--refresh_accumulation 2", "per-layer"]),
        ("--optimizer golore_adamw_per_layer --refresh_accumulation 2", ["--refresh_accumulation 2", "per-layer"]),
        ("--method galore --proj_type sideways", ["--proj_type", "'sideways'"]),
        ("--method galore --svd_method fast", ["--svd_method", "'fast'"]),
        ("--method galore --optimizer adam_zero", ["adam_zero", "galore"]),
        ("--optimizer golore_lion", ["--optimizer 'golore_lion'", "golore_adamw, golore_adamw8bit, golore_sgd"]),
        ("--optimizer galore_adam", ["--optimizer 'galore_adam'", "galore_adamw, galore_adamw8bit"]),
        ("--optimizer adamw_per_layer", ["--optimizer 'adamw_per_layer'", "unknown"]),
        ("--method golore --rand_ratio -1", ["--rand_ratio", "at least 0"]),
        ("--method galore --update_proj_gap -1", ["--update_proj_gap", "at least 0"]),
        ("--method galore --refresh_accumulation 0", ["--refresh_accumulation", "positive"]),
        ("--optimizer sgd --momentum 1", ["--momentum", "below 1"]),
    ],
)
def test_what_is_refused(problems, text, parts):
    found = problems(text)
    assert any(all(part in problem for part in parts) for problem in found), found


@pytest.mark.parametrize("proj_type", [kind for kind in SUBSPACE_DESCENT if kind != "random"])
def test_online_pca_needs_a_gap(problems, load, proj_type):
    (problem,) = problems(f"--optimizer galore_adamw --proj_type {proj_type} --update_proj_gap 0")
    assert "--update_proj_gap 0" in problem and f"--proj_type {proj_type}" in problem
    assert load("--optimizer galore_adamw --proj_type random --update_proj_gap 0").config.method.update_proj_gap == 0


# What has no effect.


@pytest.mark.parametrize(
    "text, named",
    [
        ("--optimizer galore_adamw --momentum 0.9 --dampening 0 --beta1 0.9", "--beta1, --dampening, --momentum"),
        ("--optimizer adamw8bit --momentum 0.9", "--momentum"),
        ("--optimizer galore_sgd --beta1 0.9 --adam_eps 1e-8", "--adam_eps, --beta1"),
        ("--optimizer sgd --adam_beta2 0.95", "--adam_beta2"),
        ("--optimizer galore_lion --adam_beta1 0.95 --galore_scale 0.25", "--adam_beta1, --galore_scale"),
        ("--optimizer galore_adafactor --adam_beta1 0.95 --momentum 0", "--adam_beta1, --momentum"),
        ("--optimizer galore_adamw --rand_ratio 0.8", "--rand_ratio"),
        ("--optimizer galore_adamw --proj_type continuous --rand_ratio 0.8", "--rand_ratio"),
        ("--optimizer galore_adamw --proj_type continuous --stagger_refresh", "--stagger_refresh"),
        ("--optimizer adam_zero --per_layer --clip_norm full", "--clip_norm, --per_layer"),
    ],
)
def test_what_the_rule_or_the_method_does_not_read_is_named(load, text, named):
    (warning,) = load(text).warnings
    assert warning.startswith("without effect for") and warning.endswith(f": {named}"), warning


def test_a_golore_run_that_is_never_random_warns(load):
    for text in ("", "--rand_ratio 1.5"):
        (warning,) = load(f"--optimizer golore_adamw {text}").warnings
        assert "bases will never be random" in warning
    assert load("--optimizer golore_adamw --rand_ratio 1").warnings == ()


def test_what_clipping_by_the_full_norm_costs(load):
    (warning,) = load("--optimizer galore_adamw_per_layer --clip_norm full").warnings
    assert "every layer adds up its full gradient" in warning
    assert load("--optimizer galore_adamw_per_layer --clip_norm full --clip_grad_norm 0").warnings == ()


def test_what_fsdp_takes(problems, load):
    assert load("--method galore --distributed_type fsdp").config.distributed.distributed_type == "fsdp"
    assert "--replicas 2 must divide the 1 processes" in problems(
        "--method galore --distributed_type fsdp --replicas 2"
    )
    assert "--replicas has no effect" in load("--method galore --replicas 2").warnings[0]


@pytest.mark.parametrize("method", ["full_rank", "lora", "online_subspace_descent", "galore --distributed_type fsdp"])
def test_low_rank_reduction_that_cannot_be_is_named(load, method):
    warnings = load(f"--method {method} --reduce_low_rank").warnings
    assert any("no effect" in line or "without effect" in line for line in warnings if "--reduce_low_rank" in line)
    assert not any("--reduce_low_rank" in line for line in load("--method galore --reduce_low_rank").warnings)
    assert any("--reshard" in line for line in load("--method galore --reshard_after_forward False").warnings)
