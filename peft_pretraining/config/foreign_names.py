"""Names that other trainers give to this one's settings, and what to say to those that have none here.

Only names that mean the same are accepted: what differs in its unit or in its meaning is answered with a hint.
Nothing here imports torch.
"""

from __future__ import annotations

SAME: dict[str, str] = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "lr_scheduler": "scheduler",
    "lr_scheduler_type": "scheduler",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "grad_accumulation_steps": "gradient_accumulation",
    "global_batch_size": "total_batch_size",
    "max_steps": "num_training_steps",
    "max_train_steps": "num_training_steps",
    "num_warmup_steps": "warmup_steps",
    "max_grad_norm": "clip_grad_norm",
    "adam_epsilon": "adam_eps",
    "max_seq_length": "max_length",
    "seq_length": "max_length",
    "dataloader_num_workers": "workers",
    "gradient_checkpointing": "activation_checkpointing",
    "output_dir": "save_dir",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "save_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume_from",
    "run_name": "name",
    "lora_target_modules": "target_modules",
    "tokenizer_name": "tokenizer",
    "tokenizer_name_or_path": "tokenizer",
    "torch_dtype": "dtype",
}
"""Foreign name -> our flag."""

_LENGTH = "the length of a run is --num_training_steps (updates) or --max_train_tokens"
_DTYPE = "weights and arithmetic are --precision (mixed, bf16, bf16_sr or fp32)"
_MODEL = "a new model's shape is --model_config (a JSON file), a trained model is --model_name_or_path"
_DATA = "data are --dataset_path (a folder of pretokenize.py) or --base_dir (JSON shards)"
_LAUNCHER = "it is torchrun's flag, and stands before torchrun_main.py"

HINTS: dict[str, str] = {
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "num_train_epochs"), _LENGTH),
    **dict.fromkeys(("bf16", "fp32", "mixed_precision"), _DTYPE),
    "tf32": "float32 products in TF32 are --matmul_precision high",
    "fp16": f"float16 is not supported; {_DTYPE}",
    **dict.fromkeys(("model", "model_name", "model_path", "config_name"), _MODEL),
    **dict.fromkeys(("dataset", "dataset_name", "data_path", "train_file", "data_dir"), _DATA),
    **dict.fromkeys(("nproc_per_node", "nproc-per-node", "nnodes", "master_port", "standalone"), _LAUNCHER),
    "dry_run": "scripts/pretrain.sh has it; python -m peft_pretraining.report.plan FLAGS says what a run needs",
    "warmup_ratio": "the warm-up is --warmup_steps (updates)",
    "optim": "the update rule is --optimizer (adamw, adamw8bit, adafactor, lion, sgd, ...)",
    "report_to": "give --tracker wandb,tensorboard; metrics.jsonl is always written",
    "wandb": "wandb is --with_tracking True",
    "logging_dir": "metrics.jsonl and the checkpoints are in --save_dir",
    "log_dir": "metrics.jsonl and the checkpoints are in --save_dir",
    "logging_steps": "every update is logged, to metrics.jsonl in --save_dir",
    "log_every": "every update is logged, to metrics.jsonl in --save_dir",
    "per_device_eval_batch_size": "evaluations use --batch_size",
    "min_lr": "the lowest rate is --min_lr_ratio, relative to --lr",
    "resume": "--autoresume True continues the run in --save_dir, --resume_from takes a checkpoint's folder",
    "fsdp": "divided models are --distributed_type fsdp",
    "deepspeed": "it is not supported; divided models are --distributed_type fsdp",
    "beta2": "it is --adam_beta2",
    "betas": "they are --adam_beta1 and --adam_beta2",
    "flash_attention": "it is --attn_implementation flash_attention_2",
    "torch_compile": "here it is --compile on",
    "device": "the device is CUDA where there is one (CUDA_VISIBLE_DEVICES chooses), else the CPU",
}
"""Name that is no flag -> what to write instead."""


def of(name: str) -> tuple[str, ...]:
    """Other programs' names of our flag."""
    return tuple(foreign for foreign, ours in SAME.items() if ours == name)
