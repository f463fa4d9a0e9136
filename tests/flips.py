"""Tiny runs in this process, and what each setting is flipped to: for the tests that no setting is ignored unsaid."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import write_blocks, write_model

from peft_pretraining import methods
from peft_pretraining.config import cli
from peft_pretraining.flags import ConfigError
from peft_pretraining.flags.settings import shown_default

OPERATIONAL = {
    "where the input comes from": ("model_config", "model_name_or_path", "dataset_path", "base_dir", "from_json_data"),
    "where results go, and what is kept of them": ("save_dir", "save_every", "keep_checkpoints", "async_save"),
    "which run is continued": ("autoresume", "allow_redecay", "resume_from", "warmed_up_model"),
    "speed and memory alone": (
        "workers",
        "activation_checkpointing",
        "fused_loss",
        "lean_layers",
        "compile",
        "no_offload_candidates",
        "projected_backward",
        "deterministic",
    ),
    "acts on a GPU, or with several processes": (
        "matmul_precision",
        "single_gpu",
        "reduce_low_rank",
        "replicas",
        "reshard_after_forward",
        "muon_shard_compute",
    ),
    "how many devices share the work; needs several processes": ("distributed_type",),
    "checks or traces the run beside it": ("step_timeout", "profile", "check_rank_sync"),
    "acts when something goes wrong, which nothing does here": ("skip_spikes", "rewind_on_nan"),
    "is written into checkpoints, which are not written here": ("tokenizer",),
    "what is evaluated beside the run's own; test_evaluation_sets.py": ("eval_datasets",),
    "what is said of a run; test_screen.py": ("progress_every", "sample_every", "sample_prompts"),
    "needs wandb or tensorboard; test_selection.py has their warnings": ("with_tracking", "wandb_project", "tracker"),
    "is the method, whose runs are compared elsewhere": ("method", "optimizer", "proj_type"),
    "says what is so anyway": (
        *("force_keep_original", "force_disable_candidates", "zero_switch_state", "zero_switch_step_state"),
        "padding_data",
    ),
}
"""Why a flip cannot show in the numbers of a run -> settings. Everything else is in `FLIPS`."""

FLIPS: dict[str, str] = {
    **{"precision": "mixed", "state_dtype": "weight", "basis_dtype": "int8", "gradient_sum_dtype": "weight"},
    **{"model_revision": "main", "attn_implementation": "eager", "dtype": "float64", "max_length": "8"},
    **{
        "eval_tokens": "16",
        "eval_parts": "2",
        "document_mask": "True",
        "max_document_mb": "1",
        "skip_batches": "1",
        "batch_size": "1",
        "gradient_accumulation": "3",
    },
    **{"total_batch_size": "6", "lr": "0.005", "weight_decay": "0.3", "adam_beta1": "0.5", "adam_beta2": "0.5"},
    **{"adam_eps": "0.01", "beta1": "0.5", "momentum": "0.5", "dampening": "0.5", "clip_grad_norm": "0"},
    **{"scheduler": "linear", "num_training_steps": "12", "max_train_tokens": "128", "num_extra_training_steps": "2"},
    **{"warmup_steps": "2", "min_lr_ratio": "0.5", "cycle_length": "3", "restart_warmup_steps": "1"},
    **{"decay_steps": "2", "decay_ratio": "0.5", "decay_shape": "linear"},
    **{"adjust_step": "1", "rank": "2", "scale": "0.5", "update_proj_gap": "3", "rand_ratio": "0.5"},
    **{"svd_method": "randomized", "stagger_refresh": "True", "refresh_accumulation": "2", "per_layer": "True"},
    **{"target_modules": "mlp", "clip_norm": "full", "eval_every": "2", "allow_restart": "True", "seed": "1"},
    **{"name": "n", "tags": "t", "comment": "c", "wandb_watch": "True", "older_eval_names": "True", "log_layers": "2"},
    **{"relora": "3", "lora_alpha": "3", "lora_dropout": "0.5", "lora_plus_ratio": "3", "dense_lr_ratio": "0.3"},
    **{"init_lora_type": "switchlora", "zero_init_B": "True", "train_scaling": "True", "lora_only": "True"},
    **{"quantize": "8bit", "use_double_quant": "True", "reset_optimizer_on_relora": "False"},
    **{"optimizer_random_pruning": "0.5", "optimizer_magnitude_pruning": "0.5", "switch_lora_interval": "3"},
    **{"switch_lora_descent_rate": "0.9", "switch_descend_type": "Z", "fix_switch_lora_interval": "True"},
    **{"adam_warm_step": "-1", "remain_switch_state": "True", "remain_switch_step_state": "True"},
    **{"switch_lora_drop": "0.5", "discontinuous_switch": "True", "cal_delta_norm": "True"},
    **{"adam_lr": "0.004", "head_lr": "0.003", "embed_lr": "0.02", "norm_lr": "0.005"},
    **{"soap_max_side": "20", "head_optimizer": "method", "embed_optimizer": "method"},
    **{"head_weight_decay": "0.1", "embed_weight_decay": "0.2", "norm_weight_decay": "0.3"},
}
"""Setting -> another legal value than `BASE`'s or the default. Methods' settings need none: see `flipped`."""

BASE = "--batch_size 2 --lr 0.01 --num_training_steps 6 --warmup_steps 1 --eval_every 6 --workers 0"
METHODS: dict[str, str] = {
    spec.name: " ".join(f"--{name} {shown_default(value)}" for name, value in spec.tiny.items())
    for spec in methods.METHODS.values()
}
"""Method -> flags with which it does all that it can within `BASE`'s six updates."""
_RANDOM_EARLIER = {"rand_ratio": "0.3"}
INSTEAD = {
    "golore": _RANDOM_EARLIER,
    "golore_adapter": _RANDOM_EARLIER,
    "switchlora": {"init_lora_type": "origin_lora"},
}
"""Method -> flips of its own, where `FLIPS`' value is its default."""

_FIELDS = {item.name: item for spec in methods.METHODS.values() for item in dataclasses.fields(spec.settings)}
DERIVED = tuple(
    name for name in _FIELDS if name not in FLIPS and not any(name in names for names in OPERATIONAL.values())
)
"""Settings of methods whose flip follows from what they are."""


def flipped(method: str, name: str) -> str:
    """What a setting is flipped to in a run of a method."""
    if name not in DERIVED:
        return INSTEAD.get(method, {}).get(name, FLIPS[name])
    spec, item = methods.METHODS[method], _FIELDS[name]
    return another(name, item.metadata["convert"], {**spec.defaults, **spec.tiny}.get(name, item.default))


def another(name: str, convert: Callable[[str], Any], value: Any) -> str:
    """Text for another value than `value`, which the converter takes. Raises `ValueError` where it takes none of those
    that come to mind."""
    if hasattr(convert, "allowed"):
        candidates = [choice for choice in convert.allowed if choice != value]
    elif value is None:
        candidates = ["3", "0.5", "True"]
    elif isinstance(value, bool):
        candidates = [not value]
    elif isinstance(value, int):
        candidates = [value + 1, value - 1]
    elif isinstance(value, float):
        candidates = [value / 2 or 0.5]
    else:
        candidates = []
    for candidate in map(str, candidates):
        with contextlib.suppress(ValueError):
            convert(candidate)
            return candidate
    raise ValueError(f"{name}: what it is to be flipped to needs a line in FLIPS, tests/flips.py")


_TIMES = ("throughput_tokens", "step_time", "peak_memory_bytes", "optimizer_state_bytes")


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    numbers: str | None
    """Digest of the metrics and the last weights; None where it was refused."""
    said: tuple[str, ...]
    """Problems, or warnings."""

    def says_without_effect(self, name: str) -> bool:
        lists = [line.rpartition(": ")[2].split(", ") for line in self.said if line.startswith("without effect")]
        return any(f"--{name}" in named for named in lists) or f"--{name} has no effect" in " ".join(self.said)


class Runner:
    """Runs command lines, each once."""

    def __init__(self, folder: Path):
        self._data = write_blocks(folder / "data", train=64, validation=4, block=16, vocabulary=32, eos_token_id=3)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 16}
        self._model = write_model(folder / "llama.json", vocab_size=32, **shape)
        self._folder, self._done = folder, {}

    def __call__(self, words: Sequence[str]) -> Outcome:
        key = tuple(words)
        if key not in self._done:
            self._done[key] = self._run(key, self._folder / f"run{len(self._done)}")
        return self._done[key]

    def _run(self, words: Sequence[str], save_dir: Path) -> Outcome:
        own = ["--model_config", str(self._model), "--dataset_path", str(self._data), "--save_dir", str(save_dir)]
        try:
            launch = cli.load([*own, *words], environ={})
            metrics = _train(launch, save_dir)
        except ConfigError as error:
            return Outcome(None, tuple(error.problems))
        return Outcome(hashlib.sha256(json.dumps(metrics).encode()).hexdigest(), launch.warnings)


def _train(launch: cli.ParsedArgs, save_dir: Path) -> list[Any]:
    """The records and the digest of the last weights; nothing is saved."""
    import torch

    from peft_pretraining.checkpoint.checkpointer import Checkpointer
    from peft_pretraining.training import build

    weights = hashlib.sha256()

    def save_last(checkpointer: Checkpointer, *_: Any) -> None:
        for tensor in checkpointer.model.state_dict().values():
            weights.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save_last", save_last)
        patch.setattr(build.Tracker, "record", _without_times(build.Tracker.record))
        patch.setattr(logging.getLogger("peft_pretraining"), "disabled", True)
        code = build.run(launch)
    assert code == 0, launch
    return [(save_dir / "metrics.jsonl").read_text(), weights.hexdigest()]


def _without_times(record):
    return lambda tracker, **values: record(tracker, **{k: v for k, v in values.items() if k not in _TIMES})


def words(method: str, flags: str = "", **flips: str) -> list[str]:
    """A command line of a method: later flags win, as on any command line."""
    own = f"{BASE} --method {method} {METHODS[method]} {flags}".split()
    return [*own, *(word for name, value in flips.items() for word in (f"--{name}", value))]
