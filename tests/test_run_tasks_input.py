"""What `run_tasks.py` refuses, and the commands that `scripts/winogrande.sh` gives it."""

import shlex
import subprocess
from pathlib import Path

import pytest
from option_helpers import ROWS, save_tiny_model, write_rows

import run_tasks
from peft_pretraining.finetune.options import run as options_run

PROJECT = Path(run_tasks.__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def refusals(argv, capfd):
    capfd.readouterr()
    assert run_tasks.main([str(part) for part in argv]) == 2
    return [line.removeprefix("error: ") for line in capfd.readouterr().err.splitlines() if line.startswith("error")]


def test_all_problems_of_a_command_line_are_named_at_once(capfd):
    argv = "--task_name SQuAD --trainer zo_sgd --prefix_tuning --optimizer rmsprop --num_dev 0 --load_int8 --nonsense 1"
    problems = refusals([*argv.split(), "--output_dir", "out"], capfd)
    expected = [
        ("--task_name must be one of WinoGrande, SST2", ", got 'SQuAD'"),
        ("--trainer zeroth-order training is out of scope", ", got 'zo_sgd'"),
        ("--prefix_tuning: prefix tuning is out of scope", ""),
        ("--num_dev must be a positive integer", ", got '0'"),
        ("--load_int8: weights in 8 bits cannot be trained", ""),
        ("unknown flag --nonsense", ""),
        ("--model_name is required", ""),
        ("--optimizer 'rmsprop' is unknown", ""),
    ]
    for start, end in expected:
        assert any(line.startswith(start) and line.endswith(end) for line in problems), (start, problems)
    assert len(problems) == len(expected), problems


def test_files_that_do_not_fit_together(capfd, model, tmp_path):
    begin = ["--model_name", model, "--output_dir", tmp_path / "run", "--task_name", "SST2"]
    for flags, problem in (
        ("--test_file a", "--test_file needs --train_file"),
        ("--data_file a --train_file b", "--data_file is divided into all splits: it excludes --train_file"),
        ("--trainer none --train_file a", "--trainer none needs --test_file (or --data_file, or none of the files)"),
        ("--split_by twins", "--split_by twins: the rows of SST2 have no options of their own"),
        ("--shuffle_options", "--shuffle_options: the rows of SST2 have no options of their own"),
        (
            "--trainer forward_grad",
            "--trainer training with forward-mode gradients is out of scope, got 'forward_grad'",
        ),
    ):
        assert refusals([*begin, *flags.split()], capfd) == [problem]


def test_bad_rows_and_models(capfd, model, tmp_path):
    begin = ["--output_dir", tmp_path / "run", "--task_name", "Copa", "--trainer", "none"]
    row = ROWS["Copa"][0]
    file = write_rows(tmp_path / "rows.jsonl", [row, {**row, "label": 2}, {**row, "choice2": ""}])
    assert refusals([*begin, "--model_name", model, "--test_file", file], capfd) == [
        f"{file}: row 2: label 2 is not in the label set 0, 1",
        f"{file}: row 3: choice2 is empty: a choice needs 2 options",
    ]
    write_rows(file, [{name: value for name, value in row.items() if name != "question"}])
    assert refusals([*begin, "--model_name", model, "--test_file", file], capfd) == [
        f"{file}: row 1: no column 'question' (there is premise, choice1, choice2, label)"
    ]
    file.write_text("")
    assert refusals([*begin, "--model_name", model, "--test_file", file], capfd) == [f"{file}: holds no rows"]
    write_rows(file, [row])
    (problem,) = refusals([*begin, "--model_name", model, "--test_file", file, "--max_length", "4000"], capfd)
    assert problem == "--max_length 4000: the model has 256 positions"
    (problem,) = refusals([*begin, "--model_name", tmp_path / "none", "--test_file", file], capfd)
    assert problem.startswith(f"--tokenizer {tmp_path / 'none'}: no folder with a tokenizer")
    (problem,) = refusals([*begin, "--model_name", model], capfd)
    assert problem.startswith("--task_name Copa: aps/super_glue is not loadable from the hub")
    assert not (tmp_path / "run").exists()


def dry_run(method, *flags):
    script = ["bash", str(PROJECT / "scripts" / "winogrande.sh"), method, "--dry_run", *flags]
    return subprocess.run(script, capture_output=True, text=True)


@pytest.mark.parametrize("method", ["sgd", "adam", "adamw", "galore_adamw", "galore_sgd", "golore_adamw", "golore_sgd"])
def test_winogrande_script_prints_commands_that_parse(method):
    done = dry_run(method, "--seed", "7")
    assert done.returncode == 0
    argv = shlex.split(done.stdout)
    finetuning = options_run.parse(argv[argv.index(str(PROJECT / "run_tasks.py")) + 1 :])
    sgd, projected = "sgd" in method, "lore" in method
    settings = finetuning.config.settings()
    expected = {"method": method.split("_")[0] if projected else "full_rank", "optimizer": "sgd" if sgd else "adamw"}
    expected |= {"lr": 1e-3 if sgd else 3e-5, "seed": 7}
    expected |= {"rank": 1024, "update_proj_gap": 500, "scale": 4.0 if sgd else 1.0} if projected else {}
    expected |= {"momentum": 0.9, "dampening": 0.0} if sgd else {}
    expected |= {"rand_ratio": 0.8} if method.startswith("golore") else {}
    assert {name: settings[name] for name in expected} == expected
    training = finetuning.training
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (30, 16)
    assert (training.load_best_model_at_end, training.metric_for_best_model) == (True, "accuracy")
    assert finetuning.task.train_all and finetuning.task.task_name == "WinoGrande" and finetuning.lora_all_modules


def test_layers_are_those_of_pretraining_unless_told_otherwise():
    begin = "--task_name SST2 --model_name m --output_dir out".split()
    assert options_run.parse(begin).lora_all_modules
    assert not options_run.parse([*begin, "--lora_all_modules", "False"]).lora_all_modules


def test_winogrande_script_refuses_what_it_cannot_do():
    assert dry_run("rmsprop").returncode == 2 and "error: unknown method rmsprop" in dry_run("rmsprop").stderr
    assert dry_run("sgd", "--nproc", "3").stderr == "error: --nproc 3 must divide the batch of 16\n"
    assert "--per_device_train_batch_size 4 " in dry_run("sgd", "--nproc", "4").stdout
