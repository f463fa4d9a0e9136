"""A whole run: rows, model, training, the best checkpoint on dev, the test, and the files it leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.trainer_utils import SaveStrategy

from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.finetune import settings as finetune_settings
from peft_pretraining.finetune.folder import begin
from peft_pretraining.finetune.loading import check_finite
from peft_pretraining.finetune.options.encoding import EncodedExample, OptionEncoder
from peft_pretraining.finetune.options.examples import Splits, load_splits
from peft_pretraining.finetune.options.settings import ENTRY, OptionSettings
from peft_pretraining.finetune.options.trainer import OptionTrainer, by_length
from peft_pretraining.finetune.output import RESULTS_FILE, Results, check_losses, check_metric, write_json
from peft_pretraining.finetune.results import run_seeds
from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.flags import ConfigError
from peft_pretraining.models.loading import load_pretrained
from peft_pretraining.training.tracking import log, start_logging

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import PredictionOutput

PREDICTIONS_FILE = "predictions.jsonl"
LONGEST = 2048
"""Tokens of prompt and option, unless told otherwise or the model has fewer positions."""


def parse(argv: Sequence[str]) -> FineTuning[OptionSettings]:
    """The settings of a command line. Raises `ConfigError` with all problems at once."""
    finetuning = finetune_settings.load(argv, ENTRY)
    training = finetuning.training
    chooses = training.load_best_model_at_end or training.save_strategy == SaveStrategy.BEST
    if chooses and "metric_for_best_model" not in finetuning.given:
        training.metric_for_best_model, training.greater_is_better = "accuracy", True
    elif training.metric_for_best_model is not None:
        check_metric(training.metric_for_best_model, finetuning.task.task.metrics)
    training.remove_unused_columns = False  # examples are not dictionaries
    return finetuning


def run(argv: Sequence[str]) -> Results:
    """Everything: parse, run once or under each of `--seeds`, write the results."""
    finetuning = parse(argv)
    start_logging(finetuning.training.process_index == 0)
    for warning in finetuning.warnings:
        log.warning(warning)
    with finetuning.training.main_process_first(desc="reading the data"):
        splits = load_splits(finetuning.task.task, finetuning.task)
    return run_seeds(finetuning, lambda one, start: run_one(one, splits, start), lambda one: _described(one, splits))


def run_one(finetuning: FineTuning[OptionSettings], splits: Splits, resume_from: str | None) -> Results:
    """One run in its output folder. Returns what its `all_results.json` has."""
    settings, training = finetuning.task, finetuning.training
    set_seed(training.seed)  # of the factors' first values
    tokenizer = load_tokenizer(settings.tokenizer or settings.model)
    model = load_model(settings, training.device)
    train, dev, test = encode(settings, splits, tokenizer, model)
    first = f"{len(splits.train)} demonstrations" if settings.trainer == "none" else f"{len(train)} rows for training"
    log.info("%s, %d for dev, %d for the test", first, len(dev), len(test))
    trains = settings.trainer == "regular" and training.do_train
    trainer = OptionTrainer(finetuning, model, tokenizer, train if trains else None, dev)
    begin(finetuning, resume_from)
    results: Results = _described(finetuning, splits)
    if trains:
        results |= _train(trainer, finetuning, resume_from)
    if dev and training.do_eval:
        results |= trainer.evaluate()
    if test and not settings.no_eval and (training.do_eval or training.do_predict):
        results |= run_test(trainer, test, settings, finetuning.output_dir)
    check_losses(results)
    if trainer.is_world_process_zero():
        write_results(results, settings, finetuning.output_dir)
    return results


def _train(trainer: OptionTrainer, finetuning: FineTuning[OptionSettings], resume_from: str | None) -> Results:
    results: Results = trainer.train_to_the_end(resume_from)
    if finetuning.task.save_model:
        trainer.save_model()  # merged, and the best one with --load_best_model_at_end
    trainer.save_state()
    results["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.state.best_metric is not None:
        results["best_metric"], results["best_step"] = trainer.state.best_metric, trainer.state.best_global_step
    return {**results, **trainer.optimizer_report()}


def load_model(settings: OptionSettings, device: torch.device) -> PreTrainedModel:
    """The model in the dtype that is asked for; without an accelerator, or by default, in float32."""
    dtype = torch.float32
    for name, wanted in (("load_bfloat16", torch.bfloat16), ("load_float16", torch.float16)):
        if getattr(settings, name):
            if device.type == "cpu":
                log.warning("--%s: there is no accelerator; float32 is used", name)
            else:
                dtype = wanted
    name = settings.model
    revision = settings.model_revision or "main"
    model = load_pretrained(AutoModelForCausalLM, name, f"--model_name {name}", dtype=dtype, revision=revision)
    check_finite(model, f"--model_name {name}")
    # Rows are padded with any token, and masked; the padding token's own weights are to be trained like others.
    cast("nn.Embedding", model.get_input_embeddings()).padding_idx = None
    return model


def encode(
    settings: OptionSettings, splits: Splits, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[list[EncodedExample], ...]:
    """Training, dev and test examples as tokens; with `--trainer none` the first stand before those of the test."""
    positions = getattr(model.config, "max_position_embeddings", None) or LONGEST
    if settings.max_length and settings.max_length > positions:
        raise ConfigError([f"--max_length {settings.max_length}: the model has {positions} positions"])
    encoder = OptionEncoder(tokenizer, settings.max_length or min(LONGEST, positions))
    shown = splits.train if settings.trainer == "none" else []
    train = encoder(splits.train) if settings.trainer == "regular" else []
    dev, test = (encoder(split, shown, settings.sfc, settings.icl_sfc) for split in (splits.dev, splits.test))
    entries = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    largest = max((max(option.ids) for part in (train, dev, test) for one in part for option in one.options), default=0)
    if largest >= entries:
        raise ConfigError(
            [f"--tokenizer {tokenizer.name_or_path}: the rows have token id {largest}, the model {entries} entries"]
        )
    return train, dev, test


def run_test(
    trainer: OptionTrainer, test: Sequence[EncodedExample], settings: OptionSettings, folder: Path
) -> dict[str, float]:
    ordered = by_length(test)
    output = trainer.predict(cast("Dataset[Any]", ordered))  # any sequence will do
    if settings.save_predictions and trainer.args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / PREDICTIONS_FILE, ordered, output)
    return output.metrics or {}


def write_predictions(path: Path, examples: Sequence[EncodedExample], output: PredictionOutput) -> None:
    """A line per example: its 0-based row, the scores of its options, the predicted index and the right one."""
    lines = [
        {"row": one.row, "scores": scores.tolist(), "prediction": int(scores.argmax()), "label": one.label}
        for one, scores in zip(examples, output.predictions[0], strict=True)
    ]
    lines.sort(key=lambda line: line["row"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _described(finetuning: FineTuning[OptionSettings], splits: Splits) -> Results:
    """What the run was, in the file with its results."""
    config, settings = finetuning.config, finetuning.task
    described: Results = {"task": settings.task_name, "model": settings.model_name, "seed": config.run.seed}
    described |= {f"{name}_rows": len(getattr(splits, name)) for name in ("train", "dev", "test")}
    if settings.trainer == "none":
        return described  # the training rows are demonstrations
    described |= {
        "method": config.method.method,
        "optimizer": config.optimizer.optimizer,
        "rank": config.settings().get("rank"),
    }
    return {**described, "learning_rate": config.optimizer.lr}


def write_results(results: Results, settings: OptionSettings, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS_FILE, results)
    if settings.result_file:
        Path(settings.result_file).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(settings.result_file), results)
    for name in (f"{split}_{metric}" for split in ("eval", "test") for metric in settings.task.metrics):
        if name in results:
            print(f"{name} {results[name]:.4f}")
