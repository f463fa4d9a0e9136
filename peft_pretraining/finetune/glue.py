"""Fine-tuning and evaluating on GLUE, or on rows of the same form: what `run_glue.py` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase, default_data_collator
from transformers import set_seed as seed_everything
from transformers.trainer_utils import PredictionOutput, SaveStrategy

from peft_pretraining.finetune import glue_data, settings
from peft_pretraining.finetune.folder import begin
from peft_pretraining.finetune.glue_model import encoder, load_model, usable_length
from peft_pretraining.finetune.glue_settings import ENTRY, GlueSettings
from peft_pretraining.finetune.glue_tasks import GlueTask, compute_metrics, predicted
from peft_pretraining.finetune.output import RESULTS_FILE, Results, check_losses, check_metric, finite_only, write_json
from peft_pretraining.finetune.results import run_seeds
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.finetune.trainer import MethodTrainer
from peft_pretraining.flags import ConfigError
from peft_pretraining.training.tracking import log, start_logging

_SECOND_SET = "_mm"


def parse(argv: Sequence[str]) -> FineTuning[GlueSettings]:
    """The settings of a command line. Raises `ConfigError` with all problems at once."""
    return settings.load(argv, ENTRY)


def run(argv: Sequence[str]) -> Results:
    """Everything: parse, run under each seed, write the results."""
    finetuning = parse(argv)
    start_logging(finetuning.training.process_index == 0)
    for warning in finetuning.warnings:
        log.warning(warning)
    with finetuning.training.main_process_first(desc="reading the data"):
        task, splits = glue_data.load_rows(finetuning.task)
    _check_flags(finetuning, task)
    return run_seeds(finetuning, lambda one, start: run_one(one, task, splits, start), _described)


def run_one(
    finetuning: FineTuning[GlueSettings], task: GlueTask, splits: glue_data.Splits, resume_from: str | None
) -> Results:
    """One run in its output folder: model, `all_results.json`, predictions. Returns what that file has."""
    task_settings, training = finetuning.task, finetuning.training
    seed_everything(training.seed)  # of the classifier's first weights
    model, tokenizer = load_model(task_settings, task)
    length = usable_length(task_settings, model.config, tokenizer)
    pad = task_settings.pad_to_max_length
    entries = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    encode = encoder(tokenizer, task, length, pad, entries)
    splits = {name: _encoded(_limited(name, rows, task_settings), encode) for name, rows in splits.items()}

    validation = [splits[name] for name in _of_kind(splits, "validation")]
    trainer = MethodTrainer(
        finetuning,
        model,
        train_dataset=splits["train"] if training.do_train else None,
        eval_dataset=validation[0] if validation else None,
        processing_class=tokenizer,
        data_collator=default_data_collator if pad else _padding_collator(tokenizer, finetuning),
        compute_metrics=lambda prediction: compute_metrics(task, _logits(prediction), prediction.label_ids),
    )
    begin(finetuning, resume_from)
    results: Results = _described(finetuning)
    if training.do_train:
        results |= _train(trainer, resume_from)
    if training.do_eval:
        results |= _evaluate(trainer, validation)
    if training.do_predict:
        _predict(trainer, task, {name: splits[name] for name in _of_kind(splits, "test")}, finetuning)
    if trainer.is_world_process_zero():
        write_json(finetuning.output_dir / RESULTS_FILE, results)
    return results


def _train(trainer: MethodTrainer, resume_from: str | None) -> Results:
    metrics = trainer.train_to_the_end(resume_from)
    trainer.save_model()  # merged, and the best one with --load_best_model_at_end
    trainer.save_state()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", finite_only(metrics), combined=False)
    best = trainer.state.best_metric
    metrics["train_steps"] = trainer.state.global_step
    return {**metrics, **trainer.optimizer_report(), **({} if best is None else {"best_metric": best})}


def _evaluate(trainer: MethodTrainer, validation: list[Dataset]) -> Results:
    """Numbers of all validation sets under one name each."""
    metrics: Results = {}
    for ending, rows in zip(("", _SECOND_SET), validation, strict=False):
        found = trainer.evaluate(eval_dataset=rows)
        found["eval_samples"] = len(rows)
        metrics |= {f"{name}{ending}": value for name, value in found.items() if name != "epoch"}
    check_losses(metrics)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", finite_only(metrics), combined=False)
    return metrics


def _predict(trainer: MethodTrainer, task: GlueTask, tests: dict[str, Dataset], finetuning: FineTuning) -> None:
    """A file `predict_results_{task}.txt` per test set: number of the row, tab, label or score."""
    name = finetuning.task.task_name or "task"
    for split, rows in tests.items():
        logits = _logits(trainer.predict(rows.remove_columns("labels"), metric_key_prefix="predict"))
        if not trainer.is_world_process_zero():
            continue
        ending = "-mm" if split.endswith("mismatched") else ""
        values = predicted(task, logits)
        shown = [f"{value:.3f}" if task.is_regression else task.labels[value] for value in values]
        lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(shown))]
        (finetuning.output_dir / f"predict_results_{name}{ending}.txt").write_text("\n".join(lines) + "\n")


def _logits(prediction: EvalPrediction | PredictionOutput) -> np.ndarray:
    """(N, classes); some models give further outputs."""
    first = prediction.predictions
    return first[0] if isinstance(first, tuple) else first


def _of_kind(splits: dict[str, Dataset], kind: str) -> list[str]:
    """`validation`, or `validation_matched` and then `validation_mismatched`."""
    return sorted(name for name in splits if name.startswith(kind))


def _limited(name: str, rows: Dataset, task: GlueSettings) -> Dataset:
    kind = name.partition("_")[0]
    limits = {"train": task.max_train_samples, "validation": task.max_eval_samples, "test": task.max_predict_samples}
    limit = limits[kind]
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _encoded(rows: Dataset, encode) -> Dataset:
    return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenize")


def _padding_collator(tokenizer: PreTrainedTokenizerBase, finetuning: FineTuning) -> DataCollatorWithPadding:
    half = finetuning.training.bf16 or finetuning.training.fp16
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if half else None)


def _check_flags(finetuning: FineTuning[GlueSettings], task: GlueTask) -> None:
    """What flags are about the task's numbers. The best model is that with the task's own number, unless
    `--metric_for_best_model` names another."""
    training, given = finetuning.training, finetuning.given
    if task.is_regression and training.label_smoothing_factor:
        raise ConfigError(
            [f"--label_smoothing_factor {training.label_smoothing_factor:g}: scores, unlike classes, are not smoothed"]
        )
    if "average_tokens_across_devices" in given or "no_average_tokens_across_devices" in given:
        log.warning("--average_tokens_across_devices has no effect: a classifier's loss is the mean over rows")
    chooses = training.load_best_model_at_end or training.save_strategy == SaveStrategy.BEST
    if chooses and "metric_for_best_model" not in given:
        training.metric_for_best_model = task.main_metric
        training.greater_is_better = task.main_metric != "mse"
    elif training.metric_for_best_model is not None:
        check_metric(training.metric_for_best_model, _names_of_numbers(task))


def _names_of_numbers(task: GlueTask) -> list[str]:
    """What an evaluation finds, besides the loss."""
    return list(compute_metrics(task, np.zeros((2, max(1, len(task.labels)))), np.arange(2)))


def _described(finetuning: FineTuning[GlueSettings]) -> Results:
    """What the run was, in the file with its results."""
    config, task = finetuning.config, finetuning.task
    return {
        **{"task": task.task_name or task.train_file, "model": task.model_name_or_path, "seed": config.run.seed},
        **{
            "method": config.method.method,
            "optimizer": config.optimizer.optimizer,
            "rank": config.settings().get("rank"),
        },
        "learning_rate": config.optimizer.lr,
    }
