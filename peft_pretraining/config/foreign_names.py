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

_NONE = "there is no such setting"
_BEST = "all checkpoints are kept, or the newest --keep_checkpoints N; metrics.jsonl says which was best"
_PROJECT = "wandb's project is --wandb_project"

# Fields of transformers' `TrainingArguments`, by what they are about.
_LOGGING = (
    *("logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level"),
    *("include_num_input_tokens_seen", "log_level_replica", "disable_tqdm"),
)
_EVALUATION = (
    *("eval_strategy", "evaluation_strategy", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
    *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics"),
    "batch_eval_metrics",
)
_SAVING = (
    *("save_strategy", "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "save_safetensors"),
    "restore_callback_states_from_checkpoint",
)
_HUB = (
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    "hub_revision",
)
_LOADING = (
    *("dataloader_drop_last", "dataloader_pin_memory", "dataloader_persistent_workers", "group_by_length"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    *("remove_unused_columns", "label_names", "train_sampling_strategy", "length_column_name"),
)
_DISTRIBUTED = (
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "fsdp_config", "accelerator_config", "parallelism_config", "local_rank"),
    "local-rank",
)

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
    **dict.fromkeys(("use_cpu", "no_cuda"), "CUDA_VISIBLE_DEVICES= in the environment keeps a run on the CPU"),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), f"evaluations compute as training does: {_DTYPE}"),
    "lr_scheduler_kwargs": "they are --min_lr_ratio, --cycle_length, --decay_steps, --decay_ratio and --decay_shape",
    "optim_args": "each is a flag of its own: --help METHOD lists those of a method",
    "optim_target_modules": "the layers of a method are --target_modules",
    "average_tokens_across_devices": "losses are averaged over the tokens of all devices",
    **dict.fromkeys(("label_smoothing_factor", "neftune_noise_alpha"), f"{_NONE}: the loss is that of the next token"),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), f"{_NONE} of these"),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), f"{_NONE}: --compile on says all"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "liger's loss is --fused_loss liger"),
    **dict.fromkeys(("auto_find_batch_size", "use_cache"), f"{_NONE}: peft_pretraining.report.plan says what fits"),
    "torch_empty_cache_steps": f"{_NONE}: peft_pretraining.report.plan says what fits",
    **dict.fromkeys(_LOGGING, "every update is logged, to metrics.jsonl in --save_dir"),
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _PROJECT),
    **dict.fromkeys(
        _EVALUATION, "evaluations come with --eval_every (updates), over --eval_tokens of the validation part"
    ),
    **dict.fromkeys(_SAVING, "checkpoints come with --save_every (updates), each with all that a resume needs"),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(_HUB, "exports are folders (python -m peft_pretraining.export), which `hf upload` takes"),
    "ignore_data_skip": "a resumed run reads on where it stopped; --skip_batches leaves updates out",
    "full_determinism": "it is --deterministic True",
    "data_seed": "--seed decides the order of the data, too",
    **dict.fromkeys(_LOADING, "data are read by --workers processes, in an order that their number does not change"),
    **dict.fromkeys(_DISTRIBUTED, "devices are torchrun's (or scripts/pretrain.sh --nproc) and --distributed_type"),
    **dict.fromkeys(("debug", "skip_memory_metrics"), "peak memory is in metrics.jsonl; --profile N traces updates"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "a run always trains, and evaluates with --eval_every"),
    "overwrite_output_dir": "a folder that has a run is gone on with (--autoresume True), or another is taken",
    **dict.fromkeys(("block_size", "streaming"), _DATA),
}
"""Name that is no flag -> what to write instead."""


def of(name: str) -> tuple[str, ...]:
    """Other programs' names of our flag."""
    return tuple(foreign for foreign, ours in SAME.items() if ours == name)
