"""Everything that can be set for a pre-training run, as frozen dataclasses.

Each field is also a flag of `torchrun_main.py` and a key of `--training_config` files: its help text, with units, is
its documentation. Those of methods and update rules are with these. What follows from several is in `derive.py`, what
needs files in `validate.py`. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_pretraining.config.distributed_config import DistributedConfig
from peft_pretraining.config.evaluation_sets import named_folders
from peft_pretraining.config.precision_config import Precision, PrecisionConfig, resolve
from peft_pretraining.config.role_config import RoleConfig
from peft_pretraining.config.run_config import RunConfig
from peft_pretraining.config.schedule import rate_multiplier
from peft_pretraining.config.shipped import shape
from peft_pretraining.config.tracking_config import TrackingConfig
from peft_pretraining.data.lines import LONGEST_DOCUMENT
from peft_pretraining.flags import (
    ConfigError,
    Flag,
    MethodSettings,
    boolean,
    choice,
    comma_separated,
    fraction_below_one,
    fraction_up_to_one,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    section_flags,
    sequence_length,
    setting,
    string,
    token_count,
)
from peft_pretraining.methods import METHODS, method_flags
from peft_pretraining.optim.rule_settings import RULES, AdamSettings

SCHEDULERS = ("linear", "cosine", "cosine_restarts", "constant", "cosine_with_min_lr", "wsd")


def _dtype(text: str) -> str:
    names = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
    return choice("auto", "bfloat16", "float32", "float64")(names.get(text, text))


def _update_steps(text: str) -> tuple[int, ...]:
    return tuple(non_negative_int(item) for item in comma_separated(text))


@dataclass(frozen=True)
class ModelConfig:
    model_config: str | None = setting(None, shape, "a new LLaMA's shape: a JSON file, or one of configs/ (llama_60m)")
    model_name_or_path: str | None = setting(
        None, string, "start from this Hugging Face model (name or folder) instead"
    )
    model_revision: str | None = setting(None, string, "branch, tag or commit of --model_name_or_path")
    attn_implementation: str = setting(
        "sdpa", choice("sdpa", "eager", "flash_attention_2"), "attention kernel: sdpa, eager or flash_attention_2"
    )
    dtype: str = setting(
        "auto", _dtype, "older spelling of --precision: bfloat16 (bf16), float32 (fp32), float64 (fp64)"
    )
    fused_loss: str = setting(
        "auto",
        choice("auto", "on", "off", "liger"),
        "make head and loss together, some tokens at a time, without logits of the whole batch; liger: by "
        "liger-kernel; auto: on CUDA, by liger-kernel where it is installed and --compile is off",
    )
    compile: str = setting(
        "auto",
        choice("auto", "on", "off"),
        "compile decoder layers, and the fused loss, at their first use (docs/compile.md); auto: on CUDA",
    )
    lean_layers: str = setting(
        "auto",
        choice("auto", "on", "off"),
        "norms and MLPs that keep less for the backward pass, and differ from transformers' by rounding; with mixed "
        "and bf16_sr always; auto: on CUDA",
    )
    activation_checkpointing: bool = setting(
        False, boolean, "keep only each layer's input and recompute the rest in the backward pass"
    )


@dataclass(frozen=True)
class DataConfig:
    dataset_path: str | None = setting(None, string, "folder written by pretokenize.py, or a mixture: A:0.7,B:0.3")
    base_dir: str | None = setting(None, string, "folder of C4's JSON shards, to stream documents (default: the hub's)")
    from_json_data: bool = setting(False, boolean, "--dataset_path is a folder of JSON shards, as --base_dir is")
    padding_data: bool | None = setting(None, boolean, "pad documents to --max_length: always so when streaming")
    tokenizer: str | None = setting(None, string, "for streamed documents and checkpoints (default: the data folder's)")
    max_length: int | None = setting(
        None, sequence_length, "tokens per sequence (default: a block; 256 when streaming)"
    )
    document_mask: bool = setting(
        False,
        boolean,
        "keep the documents of a block apart: no attention across their end tokens, and each begins at position 0",
    )
    max_document_mb: float = setting(
        LONGEST_DOCUMENT, positive_float, "longest line of a shard in MB, unpacked; longer ones are passed over"
    )
    workers: int = setting(
        8,
        non_negative_int,
        "data-loading processes per rank; no more than its share of cores are used",
        ("num_workers",),
    )
    eval_tokens: int = setting(
        10_000_000, token_count, "tokens of the validation set in each evaluation (M, B suffixes)"
    )
    eval_parts: int = setting(
        1, positive_int, "deal an evaluation's batches to so many parts, and record the perplexity of each as well"
    )
    eval_datasets: tuple[str, ...] = setting(
        (), named_folders, "further validation sets, NAME=FOLDER of pretokenize.py each, comma-separated"
    )
    skip_batches: tuple[int, ...] = setting(
        (), _update_steps, "0-based update steps whose batches are skipped, comma-separated (against loss spikes)"
    )


@dataclass(frozen=True)
class BatchConfig:
    """All in sequences; total_batch_size = batch_size x gradient_accumulation x world_size."""

    batch_size: int | None = setting(None, positive_int, "sequences per micro-batch and device")
    gradient_accumulation: int | None = setting(None, positive_int, "micro-batches per update and device")
    total_batch_size: int | None = setting(None, positive_int, "sequences per update, over all devices")
    world_size: int = 1  # from torchrun's environment, not a flag


@dataclass(frozen=True)
class OptimizerConfig:
    optimizer: str = setting("adamw", string, "update rule; galore_adamw and the like also choose the method")
    lr: float = setting(1e-4, positive_float, "peak learning rate")
    weight_decay: float = setting(0.0, non_negative_float, "decoupled weight decay, multiplied by the rate")
    clip_grad_norm: float = setting(
        1.0, non_negative_float, "largest global gradient norm; 0 turns clipping off", ("grad_clipping",)
    )
    skip_spikes: float = setting(
        0.0,
        non_negative_float,
        "skip updates whose loss or gradient norm is so many standard deviations above its "
        "running mean; 0 only logs them, above 6",
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """In updates, unless said otherwise."""

    scheduler: str = setting("cosine", choice(*SCHEDULERS), f"learning-rate schedule: {', '.join(SCHEDULERS)}")
    num_training_steps: int = setting(10_000, positive_int, "updates in the run")
    max_train_tokens: int | None = setting(
        None, token_count, "length of the run in tokens (M, B suffixes), instead of --num_training_steps"
    )
    num_extra_training_steps: int = setting(0, non_negative_int, "updates after the schedule's end, at its last rate")
    warmup_steps: int = setting(1000, non_negative_int, "updates of linear warm-up from 0")
    min_lr_ratio: float = setting(
        0.1, fraction_below_one, "lowest rate of the cosine schedules and of wsd, relative to --lr (default of wsd: 0)"
    )
    cycle_length: int | None = setting(
        None, positive_int, "updates per cycle of the cosine schedules (default: the run)"
    )
    restart_warmup_steps: int = setting(0, non_negative_int, "cosine_restarts: warm-up after each restart")
    adjust_step: int = setting(0, non_negative_int, "cosine_restarts: updates by which the restarts come earlier")
    decay_steps: int | None = setting(
        None, positive_int, "wsd: updates at the end in which the rate falls (default: by --decay_ratio)"
    )
    decay_ratio: float = setting(0.2, fraction_up_to_one, "wsd: --decay_steps as a share of the run")
    decay_shape: str = setting(
        "1-sqrt", choice("1-sqrt", "linear"), "wsd: how the rate falls: 1-sqrt (one less the root of time) or linear"
    )


@dataclass(frozen=True)
class Config:
    """A complete, resolved configuration: no field that the run needs is left at None."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    roles: RoleConfig = dataclasses.field(default_factory=RoleConfig)
    rule: Any = dataclasses.field(default_factory=AdamSettings)
    """A `RuleSettings`: that of the update rule `optimizer.optimizer`."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    method: Any = dataclasses.field(default_factory=MethodSettings)
    """A `MethodSettings`: that of the method, whose name it has in its field `method`."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Config:
        """Sort a flat mapping of setting names into their sections; what the method does not read is left out."""
        types: dict[str, Any] = {item.name: item.default_factory for item in dataclasses.fields(cls)}
        if (spec := METHODS.get(settings.get("method", MethodSettings().method))) is not None:
            types["method"] = spec.settings
        if (rule := RULES.get(settings.get("optimizer", OptimizerConfig().optimizer))) is not None:
            types["rule"] = rule.settings
        sections = {}
        for name, section in types.items():
            names = {item.name for item in dataclasses.fields(section)}
            sections[name] = section(**{k: v for k, v in settings.items() if k in names})
        return cls(**sections)

    def settings(self) -> dict[str, Any]:
        """The inverse of `from_settings`: every setting by its flag's name."""
        return {
            item.name: getattr(section, item.name)
            for section in (getattr(self, part.name) for part in dataclasses.fields(self))
            for item in dataclasses.fields(section)
        }

    def replace(self, **settings: Any) -> Config:
        """A copy with some settings changed, named by their flags. Raises `ValueError` for one that it has not."""
        changed = Config.from_settings({**self.settings(), **settings})
        if unknown := sorted(set(settings) - set(changed.settings())):
            raise ValueError(f"method {changed.method.method} has no setting {', '.join(unknown)}")
        return changed

    @property
    def per_layer(self) -> bool:
        """Whether weights move inside the backward pass, which not every method can do."""
        return getattr(self.method, "per_layer", False)

    def resolved_precision(self, device_type: str = "cpu") -> Precision:
        """What the run computes in on a device of this type, which matters only where no precision was asked for."""
        rule = RULES.get(self.optimizer.optimizer)
        return resolve(self.precision, self.model.dtype, device_type, compact=rule is not None and rule.compact)

    def rate_multiplier(self, step: int) -> float:
        """Of `optimizer.lr`, in an update."""
        return rate_multiplier(step, self.schedule, self.schedule.num_training_steps)


_GROUPS = {
    ModelConfig: "model",
    PrecisionConfig: "precision and memory",
    DataConfig: "data",
    BatchConfig: "batch",
    OptimizerConfig: "optimizer",
    RoleConfig: "embedding, head, norms",
    ScheduleConfig: "learning-rate schedule",
    DistributedConfig: "several devices",
    RunConfig: "run and checkpoints",
    TrackingConfig: "screen and tracking",
}


def config_flags() -> list[Flag]:
    """One flag for every setting of any section, update rule and method."""
    flags: dict[str, Flag] = {}
    for section, group in _GROUPS.items():
        flags |= {flag.name: dataclasses.replace(flag, group=group) for flag in section_flags(section)}
    for rule in RULES.values():
        for flag in section_flags(rule.settings):
            flags.setdefault(flag.name, dataclasses.replace(flag, group=_GROUPS[OptimizerConfig]))
    for flag in method_flags():
        group = f"method: {flag.group}" if flag.group else "method"
        known = flags.setdefault(flag.name, dataclasses.replace(flag, group=group))
        if known.help != flag.help:  # one value would go to both
            raise ConfigError([f"--{flag.name} has two meanings: as a setting of {known.group}, and of {flag.group}"])
    return list(flags.values())
