"""The settings of `run_glue.py` that are neither a method's nor transformers'. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.finetune.command_line import EntryPoint
from peft_pretraining.finetune.glue_tasks import GLUE_TASKS
from peft_pretraining.flags import ParsedFlag, boolean, comma_separated, positive_int, setting, string

DEFAULTS: dict[str, Any] = {"rank": 4}
"""Of the papers' GLUE runs; everything else has the defaults of the method or of transformers."""

_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
_FILES = ("train_file", "validation_file", "validation_mismatched_file", "test_file")


def _task_name(text: str) -> str:
    name = {"sts-b": "stsb", "sst-2": "sst2"}.get(text.lower(), text.lower())
    if name not in GLUE_TASKS:
        raise ValueError(f"must be one of {', '.join(GLUE_TASKS)}")
    return name


def _data_file(text: str) -> str:
    path = Path(text)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"must end in {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise ValueError("must be a file that exists")
    if path.stat().st_size == 0:
        raise ValueError("must not be an empty file")
    return text


@dataclass(frozen=True)
class GlueSettings:
    model_name_or_path: str | None = setting(
        None, string, "encoder or LLaMA: a model of the hub, or a folder such as model_N of a pre-training run"
    )
    task_name: str | None = setting(None, _task_name, f"GLUE task: {', '.join(GLUE_TASKS)}")
    train_file: str | None = setting(None, _data_file, "CSV, TSV, JSON or JSON lines, instead of the hub's rows")
    validation_file: str | None = setting(None, _data_file, "rows to evaluate on; MNLI: the matched ones")
    validation_mismatched_file: str | None = setting(None, _data_file, "MNLI: the mismatched rows")
    test_file: str | None = setting(None, _data_file, "rows to predict, with --do_predict; their labels are not read")
    text_columns: tuple[str, ...] = setting(
        (), comma_separated, "one or two columns of text, comma-separated (default: the task's, or found by type)"
    )
    label_column: str | None = setting(None, string, "column of the labels (default: label)")
    max_length: int = setting(128, positive_int, "tokens after which texts are cut off", ("max_seq_length",))
    pad_to_max_length: bool = setting(False, boolean, "pad every batch to --max_length, not to its longest row")
    max_train_samples: int | None = setting(None, positive_int, "use only so many of the first training rows")
    max_eval_samples: int | None = setting(None, positive_int, "evaluate on only so many of the first rows of a set")
    max_predict_samples: int | None = setting(None, positive_int, "predict only so many of the first test rows")
    use_llama: bool = setting(False, boolean, "the model is a LLaMA (it is recognised anyway)", ("eval_llama",))
    tokenizer_name: str | None = setting(None, string, "tokenizer (default: the model's)", ("tokenizer",))
    model_revision: str = setting("main", string, "branch, tag or commit of the model")
    cache_dir: str | None = setting(None, string, "where downloaded models are kept")

    @property
    def model(self) -> str:
        """The model's folder or hub name, which `check_settings` requires."""
        assert self.model_name_or_path is not None
        return self.model_name_or_path


def check_settings(
    settings: GlueSettings, given: Mapping[str, ParsedFlag], problems: list[str], warnings: list[str]
) -> None:
    """Settings against each other."""

    def left_out(name: str) -> bool:
        """Neither given nor, which is told already, given badly."""
        return name not in given and not any(problem.startswith(f"--{name} ") for problem in problems)

    path = settings.model_name_or_path
    if path is None and left_out("model_name_or_path"):
        problems.append("--model_name_or_path is required")
    elif path and path.startswith((".", "/", "~")) and not (Path(path).expanduser() / "config.json").is_file():
        problems.append(f"--model_name_or_path {path}: there is no model in such a folder (config.json)")
    if len(settings.text_columns) > 2:
        problems.append(f"--text_columns {','.join(settings.text_columns)}: must be one or two")
    files = [name for name in _FILES if name in given]
    if not files and left_out("task_name") and all(map(left_out, _FILES)):
        problems.append("--task_name, or --train_file and --validation_file, is required")
    if settings.validation_mismatched_file and settings.task_name != "mnli":
        problems.append("--validation_mismatched_file is for --task_name mnli")
    if not files:
        return
    steps = {name: name in given and given[name].value for name in ("do_train", "do_eval", "do_predict")}
    if not any(steps.values()):
        steps |= {"do_train": True, "do_eval": True}
    evaluates = steps["do_eval"] or ("eval_strategy" in given and given["eval_strategy"].value != "no")
    needs = {"train_file": steps["do_train"], "validation_file": evaluates, "test_file": steps["do_predict"]}
    for name, needed in needs.items():
        if needed and left_out(name):
            problems.append(f"--{name} is required beside --{files[0]}")


ENTRY = EntryPoint(
    GlueSettings,
    prog="run_glue.py",
    description="Fine-tune an encoder or a LLaMA on a GLUE task, or on CSV or JSON files, with any of the methods.",
    defaults=DEFAULTS,
    check_task=check_settings,
)


def hub_names(settings: GlueSettings) -> list[str]:
    """What has to come from the hub, or from its cache: not a folder or a file."""
    names = [settings.model_name_or_path, settings.tokenizer_name]
    if not any(getattr(settings, name) for name in _FILES):
        names.append(f"--task_name {settings.task_name}")
    return [name for name in names if name and not Path(name).is_dir()]
