"""The settings of option tasks: what is trained and tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.config import legacy
from peft_pretraining.finetune.command_line import EntryPoint
from peft_pretraining.finetune.options.tasks import TASKS, OptionTask, find_task
from peft_pretraining.flags import ParsedFlag, boolean, integer, non_negative_int, positive_int, setting, string

CONSECUTIVE = "twins"
"""The value of `--split_by` that keeps each two consecutive rows together."""

DEFAULTS: dict[str, Any] = {"rand_ratio": 0.8, "lora_all_modules": True}
"""What differs from the methods' defaults, and from GLUE's: layers are those of pre-training."""


def _task_name(text: str) -> str:
    return find_task(text).name


def _trainer(text: str) -> str:
    if text.startswith("zo_") or text == "forward_grad":
        raise ValueError(legacy.ZEROTH_ORDER if text.startswith("zo_") else legacy.FORWARD_GRADIENTS)
    if text not in ("none", "regular"):
        raise ValueError("must be none or regular")
    return text


@dataclass(frozen=True)
class OptionSettings:
    """All numbers of examples are in rows of the task."""

    task_name: str | None = setting(None, _task_name, f"option task: {', '.join(TASKS)}")
    model_name: str | None = setting(None, string, "folder or hub name of a causal model", ("model_name_or_path",))
    model_revision: str | None = setting(None, string, "branch, tag or commit of --model_name")
    tokenizer: str | None = setting(None, string, "folder or hub name (default: the model's)", ("tokenizer_name",))
    load_bfloat16: bool = setting(False, boolean, "weights in bfloat16 (without an accelerator: float32)")
    load_float16: bool = setting(False, boolean, "weights in float16 (without an accelerator: float32)")
    max_length: int | None = setting(
        None, positive_int, "tokens of prompt and option (default: 2048, or what the model has)", ("max_seq_length",)
    )
    trainer: str = setting("regular", _trainer, "regular: train and test; none: test in context, without training")
    train_file: str | None = setting(None, string, "JSON lines in the task's columns, instead of the hub's rows")
    validation_file: str | None = setting(None, string, "JSON lines for dev (default: a part of the training rows)")
    test_file: str | None = setting(None, string, "JSON lines for the test")
    data_file: str | None = setting(None, string, "JSON lines for training, dev and test, divided here")
    split_by: str | None = setting(
        None, string, f"column whose equal values stay in one split; {CONSECUTIVE}: each two consecutive rows do"
    )
    shuffle_options: bool = setting(False, boolean, "put each example's own options in a random order")
    num_train: int | None = setting(
        None, non_negative_int, "rows for training (default: all); with --trainer none, demonstrations (default: 0)"
    )
    num_dev: int | None = setting(None, positive_int, "rows that choose the best checkpoint (default: 10% of training)")
    num_eval: int | None = setting(None, positive_int, "rows of the test (default: all; 10% of --data_file)")
    train_set_seed: int = setting(0, integer, "draws the rows for training, dev and demonstrations")
    train_all: bool = setting(False, boolean, "all training rows: 90% for training and 10% for dev")
    only_train_option: bool = setting(True, boolean, "learn the right option's tokens, not the prompt's")
    train_as_classification: bool = setting(False, boolean, "cross-entropy over the options' mean log-likelihoods")
    sfc: bool = setting(False, boolean, "subtract each option's log-likelihood after a content-free prompt")
    icl_sfc: bool = setting(False, boolean, "as --sfc, with the demonstrations before the content-free prompt")
    no_eval: bool = setting(False, boolean, "leave out the test")
    save_model: bool = setting(True, boolean, "write the final model to --output_dir")
    save_predictions: bool = setting(False, boolean, "write each test row's scores to predictions.jsonl")
    result_file: str | None = setting(None, string, "a further file for the results")

    @property
    def model(self) -> str:
        """The model's folder or hub name, which `check` requires."""
        assert self.model_name is not None
        return self.model_name

    @property
    def task(self) -> OptionTask:
        """The task, which `check` requires."""
        assert self.task_name is not None
        return TASKS[self.task_name]


def check(settings: OptionSettings, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]) -> None:
    """What is wrong with the settings, or has no effect, before anything is read."""
    for flag in ("task_name", "model_name"):
        if getattr(settings, flag) is None and flag not in given and not _failed(flag, problems):
            problems.append(f"--{flag} is required")
    if settings.load_bfloat16 and settings.load_float16:
        problems.append("--load_bfloat16 and --load_float16 contradict each other")
    _check_files(settings, problems)
    task = TASKS.get(settings.task_name or "")
    if task is not None and not task.own_options:
        for flag, is_set in (
            ("shuffle_options", settings.shuffle_options),
            (f"split_by {CONSECUTIVE}", settings.split_by == CONSECUTIVE),
        ):
            if is_set:
                problems.append(f"--{flag}: the rows of {task.name} have no options of their own")
    sampling = given.get("train_sampling_strategy")
    if sampling is not None and sampling.value in ("group_by_length", "batch_rebalance"):
        problems.append(f"--{sampling.spelling}: not built for option tasks")
    elif "group_by_length" in given and given["group_by_length"].value:
        problems.append("--group_by_length: not built for option tasks")
    if unread := [f"--{given[name].spelling}" for name in _unread(settings) if name in given and given[name].value]:
        warnings.append(f"without effect beside the other flags: {', '.join(unread)}")


def _failed(flag: str, problems: list[str]) -> bool:
    """Whether the value that was given is a problem already."""
    return any(problem.startswith(f"--{flag}") for problem in problems)


def _check_files(settings: OptionSettings, problems: list[str]) -> None:
    others = [name for name in ("train_file", "validation_file", "test_file") if getattr(settings, name)]
    if settings.data_file and others:
        problems.append(f"--data_file is divided into all splits: it excludes {', '.join(f'--{o}' for o in others)}")
    elif others and not settings.train_file and (settings.trainer == "regular" or settings.num_train):
        problems.append(f"--{others[0]} needs --train_file")
    elif others and not settings.test_file and settings.trainer == "none":
        problems.append("--trainer none needs --test_file (or --data_file, or none of the files)")


def _unread(settings: OptionSettings) -> list[str]:
    names = []
    if settings.trainer == "none":
        names += ["train_all", "num_dev", "train_as_classification", "validation_file"]
    elif settings.train_all:
        names += ["num_train"] if settings.validation_file else ["num_train", "num_dev"]
    if settings.train_as_classification or settings.trainer == "none":
        names.append("only_train_option")
    if not settings.num_train or settings.trainer == "regular":
        names.append("icl_sfc")
    if settings.no_eval:
        names += ["num_eval", "save_predictions"]
    if settings.data_file and settings.no_eval:
        names.remove("num_eval")  # these rows are still held out
    return names


ENTRY = EntryPoint(
    OptionSettings,
    prog="run_tasks.py",
    description="Fine-tune a causal language model on an option task with any of the methods, or test it in context.",
    defaults=DEFAULTS,
    check_task=check,
    refused=legacy.OPTION_TASKS_REFUSED,
    passed_over=legacy.OPTION_TASKS_PASSED_OVER,
)


def hub_names(settings: OptionSettings) -> list[str]:
    """What has to come from the hub, or from its cache: not a folder or a file."""
    names = [settings.model_name, settings.tokenizer]
    if not any((settings.train_file, settings.validation_file, settings.test_file, settings.data_file)):
        names.append(f"--task_name {settings.task_name}")
    return [name for name in names if name and not Path(name).is_dir()]
