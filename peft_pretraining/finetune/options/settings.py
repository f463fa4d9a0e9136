"""The settings of option tasks that pre-training and GLUE do not have."""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import boolean, integer, non_negative_int, positive_int, setting, string
from peft_pretraining.finetune.options.tasks import TASKS, find_task

CONSECUTIVE = "twins"
"""The value of `--split_by` that keeps each two consecutive rows together."""

_OUT_OF_SCOPE = {
    **{name: "zeroth-order training is out of scope" for name in ("zo_adam", "zo_sgd", "zo_sign_opt", "zo_conserv")},
    "forward_grad": "training with forward-mode gradients is out of scope",
}

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("prefix_tuning", "num_prefix", "no_reparam", "prefix_init_by_real_act"), "prefix tuning is out of scope"
    ),
    **dict.fromkeys(
        ("prompt_tuning", "num_virtual_tokens", "prompt_init_by_real_tokens"), "prompt tuning is out of scope"
    ),
    **dict.fromkeys(
        ("zo_eps", "perturbation_mode", "q", "hide_zo", "sparse_gradient_group", "module_wise_perturbation"),
        "zeroth-order training is out of scope",
    ),
    **dict.fromkeys(("linear_probing", "head_tuning", "untie_emb"), "training a part of the model is out of scope"),
    **dict.fromkeys(("sampling", "max_new_tokens", "non_diff"), "tasks whose answers are generated are out of scope"),
}
"""Flags of the older script -> why they are refused."""


def task_name(text: str) -> str:
    return find_task(text).name


def trainer_kind(text: str) -> str:
    if text in ("none", "regular"):
        return text
    if text in _OUT_OF_SCOPE or text.startswith("zo_"):
        raise ValueError(_OUT_OF_SCOPE.get(text, _OUT_OF_SCOPE["zo_sgd"]))
    raise ValueError("must be none or regular")


@dataclass(frozen=True)
class OptionSettings:
    """What is trained and evaluated on; numbers are in examples."""

    task_name: str | None = setting(None, task_name, f"option task: {', '.join(TASKS)}")
    trainer: str = setting("regular", trainer_kind, "regular: train and test; none: test in context, without training")
    train_file: str | None = setting(None, string, "JSON lines in the task's columns, instead of the hub's rows")
    validation_file: str | None = setting(None, string, "JSON lines for dev (default: a part of the training rows)")
    test_file: str | None = setting(None, string, "JSON lines for the test")
    data_file: str | None = setting(None, string, "JSON lines for train, dev and test, divided here")
    split_by: str | None = setting(
        None, string, f"column whose equal values stay in one split; {CONSECUTIVE}: each two consecutive rows do"
    )
    shuffle_options: bool = setting(False, boolean, "put each example's own options in a random order")
    num_train: int | None = setting(
        None, non_negative_int, "for training (default: all); with --trainer none, demonstrations (default: 0)"
    )
    num_dev: int | None = setting(None, positive_int, "for choosing the best checkpoint (default: 10% of training)")
    num_eval: int | None = setting(None, positive_int, "for the test (default: all; 10% of --data_file)")
    train_set_seed: int = setting(0, integer, "draws training, dev and demonstration examples")
    train_all: bool = setting(False, boolean, "all training rows, 90% for training and 10% for dev")
    only_train_option: bool = setting(True, boolean, "learn the right option's tokens only, not the prompt's")
    train_as_classification: bool = setting(False, boolean, "cross-entropy over the options' mean log-likelihoods")
    sfc: bool = setting(False, boolean, "subtract each option's log-likelihood after a content-free prompt")
    icl_sfc: bool = setting(False, boolean, "as --sfc, with the demonstrations before the content-free prompt")
    save_predictions: bool = setting(False, boolean, "write predictions.jsonl: each test example's scores")
