"""Flags of the methods with low-rank factors: what chooses them, their defaults, what is refused or without effect."""

import pytest
from conftest import write_model

from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import METHODS


@pytest.fixture
def load(command):
    """A function: the launch of a small run with these flags added, or the problems they cause."""

    def run(text: str, processes: int = 1, **changes):
        environ = {"WORLD_SIZE": str(processes)}
        try:
            return cli.load([*command(**{"warmup_steps": None, **changes}), *text.split()], environ=environ)
        except ConfigError as error:
            return error.problems

    def with_long_run(text: str, **changes):
        return run(text, **{"num_training_steps": 2000, **changes})

    return with_long_run


@pytest.mark.parametrize(
    "text, method",
    [
        *[("--switch_lora", "switchlora"), ("--switch_lora --use_lora", "switchlora")],
        *[("--method switchlora", "switchlora"), ("--switch_lora --method switchlora", "switchlora")],
        *[("--use_peft --Relora", "relora"), ("--use_peft True --relora 500", "relora"), ("--relora 500", "relora")],
        *[("--method relora --relora 500", "relora"), ("--method relora --update_proj_gap 500", "relora")],
        *[("--use_peft", "lora"), ("--use_lora", "lora"), ("--use_peft --use_lora", "lora"), ("--method lora", "lora")],
        *[("--use_peft True --Golore", "golore_adapter"), ("--method golore_adapter", "golore_adapter")],
        *[("--method golore --use_peft --Golore", "golore_adapter"), ("--use_peft --relora 0", "lora")],
    ],
)
def test_selectors(load, text, method):
    config = load(text).config
    assert (config.method.method, config.optimizer.optimizer) == (method, "adamw")
    assert config.rule.adam_eps == (1e-6 if method == "golore_adapter" else 1e-8)


@pytest.mark.parametrize(
    "text, one, other",
    [
        ("--use_peft --Golore --optimizer golore_adamw", "--use_peft --Golore", "--optimizer golore_adamw"),
        ("--use_peft --Golore --Relora", "--use_peft --Golore", "--Relora"),
        ("--use_lora --optimizer galore_adamw", "--use_lora", "--optimizer galore_adamw"),
        ("--switch_lora --use_peft --Relora", "--switch_lora", "--Relora"),
        ("--use_peft --Relora --scale 2 --lora_alpha 4", "--scale", "--lora_alpha"),
        ("--use_lora --lora_only --force_keep_original", "--lora_only", "--force_keep_original"),
        ("--use_lora --lora_only --quantize 4bit", "--lora_only", "--quantize 4bit"),
        ("--use_lora --use_double_quant", "--use_double_quant", "--quantize 4bit"),
        ("--use_lora --use_double_quant --quantize 8bit", "--use_double_quant", "--quantize 4bit"),
        *[
            (f"--use_peft --relora 9 --reset_optimizer_on_relora True --optimizer_{kind}_pruning 0.5",
             "--reset_optimizer_on_relora", f"--optimizer_{kind}_pruning")
            for kind in ("random", "magnitude")
        ],
        ("--use_peft --relora 9 --optimizer_random_pruning 0.5 --optimizer_magnitude_pruning 0.5",
         "--optimizer_random_pruning", "--optimizer_magnitude_pruning"),
        ("--switch_lora --remain_switch_state --zero_switch_state", "--remain_switch_state", "--zero_switch_state"),
        ("--switch_lora --remain_switch_step_state --zero_switch_step_state",
         "--remain_switch_step_state", "--zero_switch_step_state"),
    ],
)  # fmt: skip
def test_contradictions_name_both(load, text, one, other):
    (problem,) = load(text)
    assert one in problem and other in problem


@pytest.mark.parametrize(
    "text, part",
    [
        ("--use_peft --Golore --optimizer adafactor", "golore_adapter goes with adamw, adamw8bit, sgd alone"),
        ("--use_peft --Golore --clip_norm full", "--clip_norm full: method golore_adapter never forms"),
        ("--use_peft --Golore --quantize 4bit", "--quantize 4bit: method golore_adapter"),
        ("--use_peft --Golore --lora_only", "--lora_only: method golore_adapter"),
        ("--use_lora --optimizer sgd", "--optimizer sgd: lora goes with adamw, adamw8bit alone"),
        ("--use_peft --relora 9 --lora_only", "--lora_only: method relora"),
        ("--method relora", "--relora N"),
        ("--use_peft --Relora --update_proj_gap 0", "--relora N"),
        ("--switch_lora --lora_only", "--lora_only: method switchlora"),
        ("--switch_lora --quantize 4bit", "--quantize 4bit: method switchlora"),
        ("--switch_lora --quantize 8bit", "--quantize 8bit: method switchlora"),
        ("--switch_lora --zero_all_state", "--zero_all_state: it failed in the older script"),
        ("--switch_lora --zero_switch_state False", "--zero_switch_state False: say --remain_switch_state"),
        ("--switch_lora --force_disable_candidates", "--force_disable_candidates"),
        ("--switch_lora --adam_warm_step 0", "--adam_warm_step must be a positive integer, or -1"),
        ("--switch_lora --adam_warm_step -2", "--adam_warm_step must be a positive integer, or -1"),
        ("--switch_lora --adam_warm_step 30", "at least twice --adam_warm_step 30"),
        ("--switch_lora --switch_lora_interval 5", "--switch_lora_interval 5 gives 5.03019 updates"),
        ("--switch_lora --switch_descend_type linear", "--switch_descend_type must be one of exponential, Z"),
        ("--switch_lora --init_lora_type xavier", "--init_lora_type must be one of origin_lora, switchlora"),
        ("--use_lora --quantize 2bit", "--quantize must be one of 4bit, 8bit"),
        ("--use_peft --relora 9 --optimizer_magnitude_pruning 1", "--optimizer_magnitude_pruning must be at least 0"),
        ("--use_lora --lora_plus_ratio 0", "--lora_plus_ratio must be greater than 0"),
        *[
            (f"--switch_lora --{name}", f"--{name}: the older scripts ignored it")
            for name in ("change_lora_lr", "no_lora_lr_ratio", "add_weighted_rank", "adjust_lora_schedule",
                         "lora_scheduler")
        ],
    ],
)  # fmt: skip
def test_what_is_refused(load, text, part):
    (problem,) = load(text)
    assert problem.startswith("--") and part in problem


@pytest.mark.parametrize(
    "text, settings",
    [
        ("--use_peft", {"lora_alpha": 32, "init_lora_type": "origin_lora", "warmup_steps": 1000, "min_lr_ratio": 0.1}),
        ("--use_lora", {"lora_alpha": 1, "init_lora_type": "switchlora", "warmup_steps": 100, "min_lr_ratio": 0}),
        ("--switch_lora", {"lora_alpha": 1, "init_lora_type": "switchlora", "warmup_steps": 100, "min_lr_ratio": 0}),
        ("--use_lora --init_lora_type origin_lora", {"lora_alpha": 1, "init_lora_type": "origin_lora"}),
        ("--use_lora --lora_alpha 3 --warmup_steps 7", {"lora_alpha": 3, "warmup_steps": 7}),
        ("--method switchlora", {"lora_alpha": 1, "init_lora_type": "switchlora", "warmup_steps": 1000}),
        ("--method lora", {"lora_alpha": 32, "init_lora_type": "origin_lora"}),
        ("--use_peft --relora 500 --rank 16", {"relora": 500, "lora_alpha": 32, "cycle_length": None}),
        ("--use_peft --Relora --rank 16", {"relora": 200, "lora_alpha": 16}),
        ("--use_peft --Relora --rank 16 --scale 0.5 --update_proj_gap 50", {"relora": 50, "lora_alpha": 8}),
        ("--use_peft --Relora --relora 70 --lora_alpha 5", {"relora": 70, "lora_alpha": 5}),
        ("--use_peft --relora 9", {"reset_optimizer_on_relora": True}),
        ("--use_peft --relora 9 --optimizer_random_pruning 0.9", {"reset_optimizer_on_relora": False}),
        ("--use_peft --relora 9 --optimizer_magnitude_pruning 0.9", {"reset_optimizer_on_relora": False}),
        ("--use_peft --relora 9 --reset_optimizer_on_relora False", {"reset_optimizer_on_relora": False}),
        (
            "--use_peft --relora 500 --scheduler cosine_restarts --warmup_steps 50 --restart_warmup_steps 9",
            {"cycle_length": 500},
        ),
        ("--switch_lora", {"switch_lora_interval": 40, "switch_lora_descent_rate": 0.1, "adam_warm_step": 5}),
        ("--switch_lora", {"rank": 128, "lora_dropout": 0, "switch_descend_type": "exponential"}),
        ("--switch_lora --adam_warm_step -1", {"adam_warm_step": -1}),
        ("--switch_lora --zero_switch_state --zero_switch_step_state", {"remain_switch_state": False}),
        ("--switch_lora --remain_switch_step_state", {"remain_switch_step_state": True}),
        ("--use_peft --Golore", {"scale": 1, "update_proj_gap": 200, "rand_ratio": 2}),
        ("--use_peft --Golore --optimizer sgd", {"optimizer": "sgd", "momentum": 0.9, "dampening": 0.9}),
        ("--use_peft --quantize 4bit --use_double_quant", {"quantize": "4bit", "use_double_quant": True}),
        ("--use_lora --force_disable_candidates", {"force_disable_candidates": True}),
        ("--use_peft --force_keep_original True --train_scaling", {"train_scaling": True}),
        ("--use_peft --lora_only", {"lora_only": True}),
        ("--use_peft --target_modules attn --lora_plus_ratio 4", {"target_modules": ("attn",), "lora_plus_ratio": 4}),
    ],
)
def test_what_is_honoured(load, text, settings):
    found = load(text)
    assert {name: found.config.settings()[name] for name in settings} == settings
    assert not [warning for warning in found.warnings if "without effect" in warning]


@pytest.mark.parametrize(
    "text, named",
    [
        ("--use_lora --relora 0 --switch_lora_interval 9", ["--relora", "--switch_lora_interval"]),
        ("--use_peft --relora 9 --init_lora_type switchlora --zero_init_B", []),
        ("--use_peft --relora 9 --scale 2 --update_proj_gap 8", ["--scale", "--update_proj_gap"]),
        ("--use_peft --Golore --lora_alpha 3 --train_scaling", ["--lora_alpha", "--train_scaling"]),
        ("--switch_lora --train_scaling --rand_ratio 0.5", ["--rand_ratio", "--train_scaling"]),
        ("--switch_lora --train_scaling False --lora_alpha 2", []),
        ("--use_peft --momentum 0.5", ["--momentum"]),
    ],
)
def test_settings_without_effect_are_named_in_one_warning(load, text, named):
    warnings = [warning for warning in load(text).warnings if warning.startswith("without effect")]
    assert [warning.split(": ")[1] for warning in warnings] == ([", ".join(named)] if named else [])


def test_a_rate_that_is_not_low_after_a_merge_is_worth_a_warning(load):
    def warned(text):
        return [warning for warning in load(f"--use_peft --relora 500 {text}").warnings if "after a merge" in warning]

    (warning,) = warned("--scheduler constant --warmup_steps 50")
    assert "(update 500) runs at 1 of --lr" in warning
    assert warned("--scheduler cosine_restarts --warmup_steps 50")
    assert not warned("--scheduler cosine_restarts --warmup_steps 50 --restart_warmup_steps 9")
    assert not warned("--scheduler cosine --cycle_length 500 --warmup_steps 50")
    assert not warned("--scheduler constant --warmup_steps 50 --num_training_steps 500")


def test_what_fsdp_cannot_divide_is_named(load):
    for method in (name for name, spec in METHODS.items() if spec.family == "low-rank factors"):
        merges = " --relora 9" if method == "relora" else ""
        assert load(f"--method {method} --distributed_type fsdp{merges}", processes=2).config.method.method == method
    refused = load("--method relora --relora 9 --distributed_type fsdp --quantize 8bit --train_scaling")
    assert [line.split(" ")[0].rstrip(":") for line in refused] == ["--quantize", "--train_scaling"]
    assert all("--distributed_type fsdp" in line and line.endswith("use ddp") for line in refused)


def test_vectors_that_switchlora_cannot_deal_out_are_named(load, tmp_path):
    model = write_model(tmp_path / "uneven.json", intermediate_size=61)

    def refused(text, processes=2):
        found = load(f"--distributed_type fsdp {text}", processes=processes, model_config=model)
        return found if isinstance(found, list) else []

    (line,) = refused("--switch_lora")
    assert line == (
        "--distributed_type fsdp: switchlora cannot divide the 61 inputs of model.layers.0.mlp.down_proj and 1 more "
        "evenly over 2 devices: use another number of them, --replicas, or ddp"
    )
    assert refused("--switch_lora --replicas 2") == []  # whole copies
    assert refused("--switch_lora --target_modules attn,up_proj") == []
    assert refused("--use_lora") == refused("--switch_lora", processes=1) == []


def test_8_bit_moments_of_factors_that_cannot_be_divided_by_columns_are_refused(load, tmp_path):
    model = write_model(tmp_path / "uneven.json", intermediate_size=61)

    def refused(text, processes=2):
        found = load(f"--distributed_type fsdp --use_peft --Golore {text}", processes=processes, model_config=model)
        return found if isinstance(found, list) else []

    (line,) = refused("--optimizer adamw8bit")
    assert line == (
        "--optimizer adamw8bit: --distributed_type fsdp cannot divide the 61 inputs of model.layers.0.mlp.down_proj "
        "evenly over 2 devices: use another number of them, --replicas, ddp, or adamw"
    )
    assert refused("--optimizer adamw") == refused("--optimizer adamw8bit --replicas 2") == []
    assert refused("--optimizer adamw8bit --target_modules attn") == []
    assert refused("--optimizer adamw8bit", processes=1) == []


def test_a_golore_run_that_is_never_random_is_worth_a_warning(load):
    assert any("never be random" in warning for warning in load("--use_peft --Golore").warnings)
    assert not any("never be random" in warning for warning in load("--use_peft --Golore --rand_ratio 0.8").warnings)


@pytest.mark.parametrize("method", ["lora", "relora", "switchlora", "golore"])
def test_recipes_pass_every_check(method, tmp_path):
    import sys

    from conftest import write_blocks
    from helpers import PROJECT

    sys.path.insert(0, str(PROJECT / "scripts"))
    import recipe

    data = write_blocks(tmp_path / "data", train=8, validation=2, block=512)
    for size in recipe.known_sizes():
        words = recipe.command(size, method, recipe.Devices(1))
        words = [*words[words.index(str(recipe.TRAINER)) + 1 :], "--dataset_path", str(data)]
        words[words.index("--save_dir") + 1] = str(tmp_path / "run")
        assert cli.load(words, environ={}).warnings == ()


def test_a_run_goes_on_with_the_factors_it_was_begun_with(load, command, tmp_path, capsys):
    import helpers

    small = {"rank": 4, "num_training_steps": 2}
    assert helpers.run([*command(**small), "--use_peft"]) == 0
    assert helpers.run([*command(**small, autoresume=True, lora_alpha=2), "--use_peft", "--train_scaling"]) == 2
    err = capsys.readouterr().err
    assert "it was begun with lora_alpha 32.0 instead of 2.0" in err
    assert "it was begun with train_scaling False instead of True" in err
