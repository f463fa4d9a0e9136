"""Which method an older command asks for, what is refused, and what has no effect."""

import pytest

from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError


@pytest.fixture
def load(command):
    """A function: the launch of a small run with these flags added, or the problems they cause."""

    def run(text: str, **changes):
        try:
            return cli.load([*command(**changes), *text.split()], environ={})
        except ConfigError as error:
            return error.problems

    return run


@pytest.mark.parametrize(
    "text, method",
    [
        ("", "full_rank"),
        ("--optimizer adamw", "full_rank"),
        ("--optimizer Adam", "full_rank"),
        ("--optimizer ADAM", "full_rank"),
        ("--use_peft False --relora 0", "full_rank"),
        ("--optimizer galore_adamw", "galore"),
        ("--method galore", "galore"),
        ("--method galore --optimizer galore_adamw", "galore"),
        ("--optimizer galore_adamw --proj_type full", "galore"),
        ("--optimizer golore_adamw", "golore"),
        ("--method golore --proj_type left", "golore"),
        ("--optimizer galore_adamw --proj_type continuous", "online_subspace_descent"),
        ("--optimizer galore_adamw --proj_type random", "online_subspace_descent"),
        ("--method online_subspace_descent", "online_subspace_descent"),
    ],
)
def test_selectors_of_methods_that_are_built(load, text, method):
    config = load(text).config
    assert (config.method.method, config.optimizer.optimizer) == (method, "adamw")
    assert config.rule.adam_eps == (1e-8 if method == "full_rank" else 1e-6)


@pytest.mark.parametrize(
    "text, one, other",
    [
        ("--switch_lora --optimizer galore_adamw", "--switch_lora", "--optimizer galore_adamw"),
        ("--method galore --use_peft", "--method galore", "--use_peft"),
        ("--method full_rank --optimizer galore_adamw", "--method full_rank", "--optimizer galore_adamw"),
        ("--method galore --proj_type continuous", "--method galore", "--proj_type continuous"),
        ("--switch_lora --relora 10", "--switch_lora", "--relora 10"),
    ],
)
def test_contradictions_name_both(load, text, one, other):
    assert any(one in problem and other in problem for problem in load(text)), load(text)


def test_defaults_that_depend_on_the_spelling(load):
    def clipping(text):
        return load(f"--method galore {text}").config.optimizer.clip_grad_norm

    assert clipping("--scale 0.25") == 1.0
    assert clipping("--galore_scale 0.25") == 0.0
    assert clipping("--galore_scale 0.25 --grad_clipping 0.5") == 0.5
    assert load("--method galore --lora_r 7").config.method.rank == 7
    assert load("--num_workers 3").config.data.workers == 3


@pytest.mark.parametrize(
    "text",
    [
        *("--from_json_data", "--plot_rank", "--compress x", "--megatron_dataset_config c.yaml"),
        *("--log_details", "--use_hf_model False", "--load_optimizer_state_on_resume False"),
    ],
)
def test_what_is_refused_is_refused_by_name(load, text):
    problems = load(text)
    assert len(problems) == 1 and problems[0].startswith(text.split()[0]), problems


@pytest.mark.parametrize(
    "text, setting, value",
    [
        ("--skip_batches 3,5", "skip_batches", (3, 5)),
        ("--with_tracking --wandb_watch", "wandb_watch", True),
        ("--async_save", "async_save", True),
        ("--with_tracking --comment tried", "comment", "tried"),
        ("--wandb_project p --name one", "name", "one"),
        ("--with_tracking --tags a,b", "tags", ("a", "b")),
        ("--profile", "profile", 5),
        ("--profile True", "profile", 5),
        ("--profile 3", "profile", 3),
        ("--profile False", "profile", 0),
        ("--use_hf_model", "method", "full_rank"),
        ("--use_hf_model True --distributed_type ddp", "method", "full_rank"),
        ("--padding_data False", "padding_data", False),
    ],
)
def test_what_is_honoured(load, text, setting, value):
    launch = load(text)
    assert launch.config.settings()[setting] == value
    assert not launch.warnings


@pytest.mark.parametrize(
    "text, named",
    [
        ("--rank 8 --lora_dropout 0.", ["--lora_dropout", "--rank"]),
        ("--update_proj_gap 5", ["--update_proj_gap"]),
        ("--train_scaling --force_keep_original True", ["--force_keep_original", "--train_scaling"]),
        ("--method galore --rand_ratio 0.8", ["--rand_ratio"]),
        ("--momentum 0.9", ["--momentum"]),
        ("--per_layer --svd_method exact", ["--per_layer", "--svd_method"]),
        ("--stagger_refresh --refresh_accumulation 4", ["--refresh_accumulation", "--stagger_refresh"]),
        ("--tags a --name n --comment c --wandb_watch", ["--comment", "--name", "--tags", "--wandb_watch"]),
        ("--with_tracking False --tags a", ["--tags"]),
        ("--wandb_project p --with_tracking False", ["--with_tracking False"]),
        ("--scheduler linear --min_lr_ratio 0.2 --cycle_length 5", ["--cycle_length", "--min_lr_ratio"]),
        ("--scheduler constant --min_lr_ratio 0.2", ["--min_lr_ratio"]),
        ("--scheduler cosine_with_min_lr --min_lr_ratio 0.2", ["--min_lr_ratio"]),
        ("--restart_warmup_steps 3 --adjust_step 2", ["--adjust_step", "--restart_warmup_steps"]),
        ("--scheduler cosine_restarts --restart_warmup_steps 3", ["--restart_warmup_steps"]),
        ("--scheduler cosine_restarts --cycle_length 10 --warmup_steps 1", ["--cycle_length"]),
        ("--method lora --train_scaling --lora_alpha 3", ["--lora_alpha"]),
        ("--method galore --update_proj_gap 0 --stagger_refresh", ["--stagger_refresh"]),
        ("--allow_restart", ["--allow_restart"]),
        ("--method lora --reset_optimizer_on_relora False", ["--reset_optimizer_on_relora"]),
        ("--method lora --zero_init_B", ["--zero_init_B"]),
        ("--method lora --lora_only --init_lora_type switchlora", ["--init_lora_type"]),
        ("--method switchlora --fix_switch_lora_interval --switch_descend_type Z", ["--switch_descend_type"]),
        ("--optimizer galore_adamw --proj_type random --refresh_accumulation 2", ["--refresh_accumulation"]),
        ("--method golore --rand_ratio 0 --refresh_accumulation 2", ["--refresh_accumulation"]),
    ],
)
def test_settings_without_effect_are_named_in_one_warning(load, text, named):
    (warning,) = load(text).warnings
    assert warning.startswith("without effect") and warning.endswith(": " + ", ".join(named))


def test_padding_without_effect(load):
    """Blocks are full."""
    (warning,) = load("--padding_data").warnings
    assert warning.startswith("--padding_data has no effect")


def test_model_revision_and_base_dir_without_effect(load):
    warnings = load("--model_revision main --base_dir /data").warnings
    assert any("--model_revision has no effect" in warning for warning in warnings)
    assert any("--dataset_path wins over --base_dir" in warning for warning in warnings)


OLDER_COMMANDS = {
    "GoLore, adapter form": (
        "--base_dir /data/c4 --autoresume True --batch_size 128 --total_batch_size 512 --lr 0.001 "
        "--max_length 64 --rank 128 --update_proj_gap 200 --cycle_length 10000 --warmup_steps 1000 "
        "--num_training_steps 10000 --save_every 10000 --eval_every 500 --optimizer adamw --rand_ratio 0.8 "
        "--tags GoLore_60M --use_peft True --Golore"
    ),
    "GaLore": (
        "--base_dir /data/c4 --autoresume True --batch_size 128 --total_batch_size 512 --lr 0.001 "
        "--max_length 64 --rank 128 --update_proj_gap 200 --cycle_length 10000 --warmup_steps 1000 "
        "--num_training_steps 10000 --save_every 10000 --eval_every 500 --optimizer galore_adamw --tags "
        "GaLore_60M"
    ),
    "GoLore": (
        "--base_dir /data/c4 --autoresume True --batch_size 128 --total_batch_size 512 --lr 0.001 "
        "--max_length 64 --rank 128 --update_proj_gap 200 --cycle_length 10000 --warmup_steps 1000 "
        "--num_training_steps 10000 --save_every 10000 --eval_every 500 --optimizer golore_adamw "
        "--rand_ratio 0.8 --tags GoLore_60M_rand0.8 --num_extra_training_steps 5000 --with_tracking"
    ),
    "SGD": (
        "--batch_size 128 --total_batch_size 512 --lr 0.01 --max_length 64 --warmup_steps 1000 "
        "--num_training_steps 10000 --optimizer sgd"
    ),
    "SwitchLoRA, full rank": (
        "--batch_size 72 --total_batch_size 1152 --lr 1e-3 --max_length 64 --num_training_steps 40002 "
        "--save_every 2000 --eval_every 1000 --keep_checkpoints 100 --num_workers 8 --autoresume True"
    ),
    "SwitchLoRA, LoRA": (
        "--batch_size 72 --total_batch_size 1152 --lr 0.01 --max_length 64 --num_training_steps 40002 "
        "--save_every 1000 --eval_every 1000 --keep_checkpoints 300 --num_workers 8 --use_lora --lora_rank "
        "128 --lora_dropout 0. --autoresume True"
    ),
    "SwitchLoRA": (
        "--batch_size 72 --total_batch_size 1152 --lr 0.02 --max_length 64 --num_training_steps 40002 "
        "--keep_checkpoints 300 --num_workers 8 --lora_rank 256 --lora_dropout 0. --switch_lora "
        "--switch_lora_descent_rate 0.1 --zero_switch_step_state --zero_switch_state --autoresume True"
    ),
    "ReLoRA": (
        "--batch_size 24 --total_batch_size 1152 --lr 1e-3 --max_length 64 --use_peft --relora 5000 "
        "--cycle_length 5000 --restart_warmup_steps 100 --scheduler cosine_restarts --warmup_steps 500 "
        "--reset_optimizer_on_relora True --num_training_steps 20000 --save_every 5000 --eval_every 5000 "
        "--tags relora_250M"
    ),
    "OSD": (
        "--lr 0.01 --galore_scale 0.25 --rank 128 --update_proj_gap 200 --batch_size 256 --total_batch_size "
        "512 --num_training_steps 10000 --warmup_steps 1000 --weight_decay 0 --dtype bfloat16 --eval_every "
        "1000 --optimizer galore_adamw --proj_type continuous"
    ),
    "OSD, 7B": (
        "--lr 0.005 --galore_scale 0.25 --rank 1024 --update_proj_gap 500 --batch_size 16 --total_batch_size "
        "512 --activation_checkpointing --num_training_steps 150000 --warmup_steps 15000 --weight_decay 0 "
        "--grad_clipping 1.0 --dtype bfloat16 --eval_every 1000 --single_gpu --proj_type continuous_adam8bit "
        "--optimizer galore_adamw8bit_per_layer"
    ),
}


@pytest.mark.parametrize("name", list(OLDER_COMMANDS))
def test_older_commands_run(name, model_json, data_dir, tmp_path):
    argv = ["--model_config", str(model_json), "--dataset_path", str(data_dir), "--save_dir", str(tmp_path / "run")]
    launch = cli.load([*argv, *OLDER_COMMANDS[name].split()], environ={})
    assert launch.config.batch.gradient_accumulation * launch.config.batch.batch_size in (512, 1152)


def test_nothing_heavy_is_imported_before_the_input_is_known_to_be_good(command):
    import subprocess
    import sys

    code = (
        "import sys; from peft_pretraining.config import cli; cli.load(sys.argv[1:], environ={}); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code, *command()], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
