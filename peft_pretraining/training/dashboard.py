"""What wandb and TensorBoard have in common: names of runs and numbers, and that none of their errors ends a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.config import Config
from peft_pretraining.methods import METHODS
from peft_pretraining.training.samples import Sample

log = logging.getLogger("peft_pretraining")

_OLDER = "final_eval_"
_LONGEST_NAME = 120


class Dashboard:
    """Passes records on until the first error of a service, a network or a disk; then says so, once, and is silent.

    `target` is what takes them; None does nothing. All that is lost is in `metrics.jsonl`.
    """

    title = "a dashboard"

    def __init__(self, target: Any):
        self._target = target

    def watch(self, model: Any) -> None:
        """Histograms of weights and gradients."""

    def log(self, values: Mapping[str, Any]) -> None:
        """One record, under the names of `named`."""

    def alert(self, title: str, text: str, update_step: int) -> None:
        """Something that somebody should look at."""

    def texts(self, update_step: int, samples: Sequence[Sample]) -> None:
        """Prompts, and how the model continues them."""

    def go_back(self, state: TrainState) -> None:
        """The run has gone back to `state`."""

    def finish(self, exit_code: int) -> None:
        """The run is over."""

    def _do(self, act: Callable[[Any], Any]) -> None:
        if self._target is None:
            return
        try:
            act(self._target)
        except Exception as error:  # of its service, its connection, its files
            self._target = None
            log.warning("%s records no further (%s); metrics.jsonl has everything", self.title, first_line(error))


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def named(record: Mapping[str, Any], last_step: int, older_names: bool = False) -> dict[str, Any]:
    """A record of `metrics.jsonl` as dashboards get it: evaluations are `eval/...`; the last one, and with
    `older_names` each, also has the names of older dashboards; what belongs to layers is `layers/WHAT/LAYER`.

    >>> named({"update_step": 5, "final_eval_loss": 3.5}, 10)
    {'update_step': 5, 'eval/loss': 3.5}
    >>> named({"update_step": 10, "final_eval_loss": 3.5}, 10)
    {'update_step': 10, 'eval/loss': 3.5, 'final_eval_loss': 3.5}
    >>> named({"update_step": 5, "eval_sets": {"wiki": {"loss": 3.0}}}, 10)
    {'update_step': 5, 'eval/wiki/loss': 3.0}
    >>> named({"loss": 2.0, "layers": {"q_proj": {"grad_norm": 0.5}}}, 10)
    {'loss': 2.0, 'layers/grad_norm/q_proj': 0.5}
    """
    result: dict[str, Any] = {}
    for name, value in record.items():
        if name == "eval_sets":
            result |= {f"eval/{each}/{what}": number for each, of in value.items() for what, number in of.items()}
        elif name == "source_tokens":
            result |= {f"data/{source}/tokens": number for source, number in value.items()}
        elif name == "layers":
            result |= {f"layers/{what}/{layer}": number for layer, of in value.items() for what, number in of.items()}
        elif name.startswith(_OLDER):
            result[f"eval/{name.removeprefix(_OLDER)}"] = value
            if older_names or record["update_step"] >= last_step:
                result[name] = value
        else:
            result[name] = value
    return result


def model_name(config: Config) -> str:
    """`llama_60m` of `configs/llama_60m.json`; that of a hub's model without its owner."""
    model = config.model.model_config or config.model.model_name_or_path or config.run.warmed_up_model or "model"
    return Path(model).stem if config.model.model_config else Path(model).name


def group_name(config: Config) -> str:
    """What runs to be averaged or compared side by side share: the model and the method."""
    return f"{model_name(config)}-{config.method.method}"


def run_name(config: Config) -> str:
    """The method and what is special about its run: rate, rank, seed, and each of its settings that was changed."""
    spec, method = METHODS[config.method.method], config.method
    usual = {item.name: item.default for item in dataclasses.fields(method)} | dict(spec.defaults)
    settings = config.settings()
    usual_rule = settings["optimizer"] == spec.update_rules[0]
    shown = {"optimizer": None if usual_rule else settings["optimizer"], "lr": settings["lr"]}
    shown |= {"rank": settings.get("rank"), "seed": settings["seed"]}
    changed = {name: settings[name] for name in spec.own if name in settings and settings[name] != usual.get(name)}
    words = [f"{name}={_short(value)}" for name, value in {**shown, **changed}.items() if value is not None]
    return " ".join([spec.name, *words])[:_LONGEST_NAME]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else ",".join(value) if isinstance(value, tuple) else str(value)
