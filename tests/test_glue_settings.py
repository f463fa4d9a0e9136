"""Command lines of `run_glue.py`: the older scripts' run as they stand, and bad ones are told everything at once."""

import json
import re
import subprocess
import sys

import pytest
from finetune_helpers import rows, write_rows
from helpers import PROJECT, child_environment

from peft_pretraining.finetune import glue
from peft_pretraining.flags import ConfigError

GOLORE = (
    "--model_name_or_path roberta-base --task_name mrpc --lora_all_modules --max_length 512 --seed 42 --lora_r 4 "
    "--scale 4 --per_device_train_batch_size 16 --update_proj_gap 500 --num_train_epochs 30 "
    "--output_dir ./results/ft/roberta_base/mrpc --learning_rate 3e-5 --enable_golore --rand_ratio 0.8"
)
SWITCHLORA = (
    "--model_name_or_path {folder} --task_name stsb --use_llama True --do_train --do_eval --evaluation_strategy epoch "
    "--save_total_limit 2 --save_steps 100000 --overwrite_output_dir --seed 1 --output_dir OUT --max_seq_length 512 "
    "--num_train_epochs 30 --per_device_train_batch_size 16 --learning_rate 1e-5"
)
SHORT = "--model_name_or_path roberta-base --task_name rte --output_dir OUT "


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        glue.parse(text.split())
    return error.value.problems


def test_golore_command():
    found = glue.parse(GOLORE.split())
    method, training = found.config.method, found.training
    assert (method.method, method.rank, method.scale) == ("golore_adapter", 4, 4.0)
    assert (method.update_proj_gap, method.rand_ratio) == (500, 0.8)
    assert found.lora_all_modules and found.task.max_length == 512 and found.task.task_name == "mrpc"
    assert (training.num_train_epochs, training.per_device_train_batch_size, training.seed) == (30, 16, 42)
    assert training.learning_rate == found.config.optimizer.lr == 3e-5
    assert training.do_train and training.do_eval and not training.do_predict
    assert training.report_to == [] and not found.warnings
    tracked = glue.parse([*GOLORE.split(), "--with_tracking", "--report_to", "wandb"])
    assert tracked.training.report_to == ["wandb"]


def test_switchlora_command(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = glue.parse(SWITCHLORA.format(folder=tmp_path).split())
    assert found.config.method.method == "full_rank" and found.overwrite_output_dir
    assert found.task.use_llama and found.task.max_length == 512 and found.task.task_name == "stsb"
    assert found.training.eval_strategy == "epoch" and found.training.save_total_limit == 2


@pytest.mark.parametrize(
    "text, method, rule",
    [
        ("", "full_rank", "adamw"),
        ("--enable_galore", "galore", "adamw"),
        ("--enable_galore --optimizer adamw8bit", "galore", "adamw8bit"),
        ("--enable_galore True --proj_type continuous", "online_subspace_descent", "adamw"),
        ("--enable_galore false --enable_golore False", "full_rank", "adamw"),
        ("--optimizer golore_sgd --momentum 0.9 --dampening 0", "golore", "sgd"),
        ("--use_peft True --Golore", "golore_adapter", "adamw"),
        ("--use_lora", "lora", "adamw"),
        ("--use_peft --relora 10", "relora", "adamw"),
        ("--switch_lora", "switchlora", "adamw"),
        ("--method lora", "lora", "adamw"),
    ],
)
def test_methods(text, method, rule):
    config = glue.parse((SHORT + text).split()).config
    assert (config.method.method, config.optimizer.optimizer) == (method, rule)


def test_what_training_arguments_have_reaches_the_method():
    text = (
        "--learning_rate 2e-3 --weight_decay 0.1 --adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-7 "
        "--max_grad_norm 0.5 --seed 7 --gradient_accumulation_steps 3 --enable_galore"
    )
    config = glue.parse((SHORT + text).split()).config
    found, rule = config.optimizer, config.rule
    assert (found.lr, found.weight_decay, rule.adam_beta1, rule.adam_beta2) == (2e-3, 0.1, 0.8, 0.95)
    assert (rule.adam_eps, found.clip_grad_norm) == (1e-7, 0.5)
    assert (config.run.seed, config.batch.gradient_accumulation) == (7, 3)
    aliases = glue.parse((SHORT + "--lr 2e-3 --grad_clipping 0.5 --adam_eps 1e-7 --galore_scale 2").split()).config
    assert (aliases.optimizer.lr, aliases.optimizer.clip_grad_norm, aliases.rule.adam_eps) == (2e-3, 0.5, 1e-7)
    assert glue.parse((SHORT + "--enable_galore").split()).config.rule.adam_eps == 1e-6  # the method's own


def test_flags_that_transformers_dropped():
    text = (
        "--no_cuda --per_gpu_train_batch_size 3 --per_gpu_eval_batch_size=5 --logging_dir logs --fp16_opt_level O1 "
        "--warmup_ratio 0.1 --save_safetensors True --group_by_length True --fp16 --seeds 1,2 --bf16 False"
    )
    found = glue.parse((SHORT + text).split())
    training = found.training
    assert training.use_cpu and not training.fp16 and not training.bf16
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (3, 5)
    assert training.get_warmup_steps(1000) == 100 and training.train_sampling_strategy == "group_by_length"
    assert found.seeds == (1, 2)
    warned = "\n".join(found.warnings)
    for name in ("--logging_dir", "--fp16_opt_level", "--save_safetensors", "--fp16: there is no accelerator"):
        assert name in warned, name


@pytest.mark.parametrize(
    "text, parts",
    [
        ("--task_name rtee", ("--task_name must be one of cola", "'rtee'")),
        ("--learning_rat 1", ("unknown flag --learning_rat", "learning_rate")),
        ("--method nonsense", ("--method 'nonsense' is unknown", "switchlora")),
        ("--learning_rate -1e-3", ("--learning_rate must be greater than 0",)),
        ("--num_train_epochs many", ("--num_train_epochs must be a number", "'many'")),
        ("--per_device_train_batch_size 0", ("--per_device_train_batch_size must be greater than 0",)),
        ("--eval_strategy sometimes", ("--eval_strategy must be one of no", "'sometimes'")),
        ("--load_best_model_at_end --eval_strategy epoch", ("TrainingArguments", "strategy")),
        ("--enable_galore --enable_golore", ("--enable_golore", "--enable_galore")),
        ("--enable_golore --optimizer golore_adamw", ("--enable_golore", "--optimizer golore_adamw")),
        ("--enable_golore --optimizer lion", ("--optimizer lion", "golore_adapter")),
        ("--optim sgd", ("--optim sgd", "--optimizer")),
        ("--deepspeed x.json", ("--deepspeed", "DDP")),
        ("--refresh_accumulation 2 --enable_galore", ("--refresh_accumulation 2",)),
        ("--train_file none.csv", ("--train_file must be a file that exists", "'none.csv'")),
        ("--train_file run.parquet", ("--train_file must end in .csv",)),
        ("--model_name_or_path ./nowhere", ("--model_name_or_path ./nowhere", "config.json")),
        ("--text_columns a,b,c", ("--text_columns a,b,c",)),
        ("--seeds 1,1", ("--seeds must not name a seed twice",)),
        ("--with_tracking --report_to none", ("--with_tracking", "--report_to is none")),
        ("--fp16 maybe", ("--fp16 must be True or False",)),
    ],
)
def test_problems(text, parts):
    found = problems_of(SHORT + text)
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0], found


def test_all_problems_at_once_and_exit_code_2(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    flags = "--task_name nope --nonsense 3 --max_length -1 --method what --lr x"
    command = [sys.executable, "run_glue.py", *flags.split(), "--train_file", str(tmp_path / "empty.jsonl")]
    done = subprocess.run(command, cwd=PROJECT, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    told = ("task_name", "nonsense", "max_length", "method", "lr", "train_file", "model_name_or_path", "output_dir")
    assert len(lines) == len(told), lines
    for name in told:
        assert any(re.match(f"error: (unknown flag )?--{name}\\b", line) for line in lines), (name, lines)
    assert "Traceback" not in done.stderr


def test_files_need_each_other(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", rows("sst2", 2))
    base = f"--model_name_or_path roberta-base --output_dir OUT --train_file {train}"
    assert problems_of(base) == ["--validation_file is required beside --train_file"]
    assert glue.parse(f"{base} --do_train".split()).task.train_file == str(train)
    assert problems_of(f"{base} --do_train --do_predict") == ["--test_file is required beside --train_file"]
    assert problems_of("--model_name_or_path roberta-base --output_dir OUT") == [
        "--task_name, or --train_file and --validation_file, is required"
    ]


def test_paper_settings_are_printed_as_a_command(tmp_path):
    done = subprocess.run(
        ["bash", str(PROJECT / "scripts" / "glue.sh"), "rte", "galore", "--dry_run"], cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = done.stdout.split()
    at = next(index for index, word in enumerate(command) if word.endswith("run_glue.py"))
    found = glue.parse(command[at + 1 :])
    assert (found.config.method.method, found.config.method.rank, found.task.task_name) == ("galore", 4, "rte")
    assert json.dumps(found.training.num_train_epochs) == "30.0"


def test_settings_of_a_file(tmp_path):
    """Of every kind: the method's, transformers', the task's, fine-tuning's own; the command line wins."""
    file = tmp_path / "settings.yaml"
    file.write_text(
        "task_name: rte\nmodel_name_or_path: roberta-base\nmethod: galore\nrank: 6\nlearning_rate: 4e-4\n"
        "evaluation_strategy: no\nsave_strategy: epoch\nlogging_first_step: yes\nmax_length: 77\nseeds: [3, 4]\n"
        "report_to: none\noverwrite_output_dir: True\n"
    )
    found = glue.parse(["--training_config", str(file), "--output_dir", "OUT", "--rank", "8"])
    assert (found.config.method.method, found.config.method.rank, found.config.optimizer.lr) == ("galore", 8, 4e-4)
    assert (found.training.eval_strategy, found.training.save_strategy) == ("no", "epoch")
    assert found.training.logging_first_step and found.task.max_length == 77
    assert found.seeds == (3, 4) and found.overwrite_output_dir and not found.warnings
    file.write_text("rank: many\nlearning_rat: 1\noptim: sgd\nlora_rank: 3\nprefix_tuning: True\n")
    problems = problems_of(f"--training_config {file} {SHORT}")
    bad_rank = f"--rank must be an integer, got 'many' (in {file})"
    for part in (bad_rank, "unknown key 'learning_rat' (did you mean", "--optim sgd: the method builds"):
        assert any(part in problem for problem in problems), (part, problems)


def test_a_setting_under_two_names_is_told():
    found = glue.parse((SHORT + "--max_length 32 --max_seq_length 64 --lr 1e-3 --learning_rate 1e-3").split())
    assert found.task.max_length == 64
    assert found.warnings == (
        "--max_length 32 has no effect: --max_seq_length, which is the same setting, was given after it",
    )


def test_help_has_groups_and_the_defaults_of_fine_tuning(capsys):
    for words, parts in (
        (
            ["--help"],
            ("model and task:", "transformers' Trainer:", "method: lora:", "older code bases:", "--learning_rate"),
        ),
        (["--help", "galore"], ("GaLore:", "settings of galore:", "low-rank updates (default: 4)")),
        (["--help", "lora"], ("settings of lora:", "(default: as --lora_all_modules says)")),
    ):
        with pytest.raises(SystemExit) as stopped:
            glue.parse(words)
        shown = " ".join(capsys.readouterr().out.split())
        assert stopped.value.code == 0
        assert [part for part in parts if part not in shown] == []
