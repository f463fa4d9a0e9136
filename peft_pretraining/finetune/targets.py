"""Which layers of a model to fine-tune with a low-rank method."""

from __future__ import annotations

from torch import nn

from peft_pretraining.finetune.settings import FineTuning
from peft_pretraining.flags import ConfigError
from peft_pretraining.models.targets import is_linear, shared_weights

LLAMA_TARGETS = ("q_proj", "v_proj")
LLAMA_ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_TARGETS = ("query",)
BERT_ALL_TARGETS = ("query", "key", "value", "intermediate.dense", "output.dense")
"""Parts of dotted names: `output.dense` is in `attention.output.dense`, too; neither pooler nor classifier match."""


def target_modules(model: nn.Module, finetuning: FineTuning) -> tuple[str, ...]:
    """`--target_modules` if given; otherwise by the model's naming, all layers or only queries and values.

    Raises `ConfigError` for a model that is named neither as LLaMA nor as BERT.
    """
    if finetuning.target_modules_given:
        return finetuning.config.method.target_modules
    shared = shared_weights(model)  # as a tied head's: no target
    names = [name for name, module in model.named_modules() if is_linear(module) and name not in shared]
    for few, every in ((LLAMA_TARGETS, LLAMA_ALL_TARGETS), (BERT_TARGETS, BERT_ALL_TARGETS)):
        if all(any(target in name for name in names) for target in few):
            return every if finetuning.lora_all_modules else few
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    raise ConfigError([f"{type(model).__name__}: name its layers with --target_modules; there are {kinds}"])
