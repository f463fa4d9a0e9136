"""What becomes of every field of transformers' `TrainingArguments`: obeyed, passed over, or refused with the reason.

A field that is in none of these tables is one of a newer transformers: refused until somebody has looked at it. Nothing
here imports transformers.
"""

from __future__ import annotations

OBEYED: tuple[str, ...] = (
    # Length, rate and weights: read by `Trainer`, or handed to the method's configuration.
    *("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "gradient_accumulation_steps", "average_tokens_across_devices", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha", "seed", "data_seed", "full_determinism"),
    # Precision and memory.
    *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "torch_empty_cache_steps"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "skip_memory_metrics"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    # Logging.
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    # Evaluation.
    *("do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("per_device_eval_batch_size", "eval_accumulation_steps"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    # Checkpoints.
    *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model"),
    *("resume_from_checkpoint", "ignore_data_skip"),
    # Data and processes.
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    *("remove_unused_columns", "train_sampling_strategy", "accelerator_config"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout"),
)

_ONE_PROCESS = "fine-tuning runs in one process, or under torchrun with DDP"
_NO_HUB = "push the folder that was saved with the hub's own client"
_PREDICTIONS = "the tasks' numbers are computed from all predictions at once"

REFUSED: dict[str, str] = {
    "optim": "the method builds its optimizer: use --optimizer",
    "optim_args": "the method builds its optimizer: use the flags of --optimizer and --method",
    "optim_target_modules": "use --target_modules",
    "auto_find_batch_size": "a method's state cannot be built a second time in one run: choose the batch size",
    "use_liger_kernel": "its kernels replace layers that the methods change",
    "liger_kernel_config": "its kernels replace layers that the methods change",
    "use_cache": "nothing is generated",
    "prediction_loss_only": _PREDICTIONS,
    "batch_eval_metrics": _PREDICTIONS,
    "eval_do_concat_batches": _PREDICTIONS,
    "eval_use_gather_object": "predictions are tensors",
    "label_names": "the labels' names are the task's",
    "length_column_name": "lengths are those of the tokens: there is no such column",
    "restore_callback_states_from_checkpoint": "no callback here has a state to restore",
    "enable_jit_checkpoint": "a run that is asked to stop saves in any case",
    "debug": "a run whose gradients are not finite ends by itself and says so",
    "parallelism_config": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "deepspeed": _ONE_PROCESS,
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"), _NO_HUB
    ),
    "hub_revision": _NO_HUB,
}
"""Fields that cannot be combined with a training method, or act on nothing here. Their defaults may be given."""

WITHOUT_EFFECT: dict[str, str] = {
    "logging_dir": "transformers reads the environment variable TENSORBOARD_LOGGING_DIR instead",
    "fp16_opt_level": "mixed precision is torch's own",
    "fp16_backend": "mixed precision is torch's own",
    "half_precision_backend": "mixed precision is torch's own",
    "save_safetensors": "weights are always saved as safetensors",
    "include_inputs_for_metrics": "no metric here reads the inputs",
    "include_for_metrics": "no metric here reads the inputs or the losses",
    "past_index": "no model here has such an output",
    "tpu_num_cores": "there is no support for TPUs",
    "ray_scope": "there is no hyper-parameter search",
    "local_rank": "torchrun sets the environment variable LOCAL_RANK",
}
"""Flags, most of which transformers dropped, that can be passed over: why they have no effect."""

ALIASES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "max_grad_norm": ("clip_grad_norm", "grad_clipping"),
    "adam_epsilon": ("adam_eps",),
    "eval_strategy": ("evaluation_strategy",),
    "use_cpu": ("no_cuda",),
    "per_device_train_batch_size": ("per_gpu_train_batch_size",),
    "per_device_eval_batch_size": ("per_gpu_eval_batch_size",),
    "dataloader_num_workers": ("num_workers", "workers"),
    "warmup_steps": ("num_warmup_steps", "warmup_ratio"),
}
"""Further spellings of a field: the package's own, and those that transformers dropped."""

_INTERVALS = ("no", "steps", "epoch")

CHOICES: dict[str, tuple[str, ...]] = {
    "logging_strategy": _INTERVALS,
    "eval_strategy": _INTERVALS,
    "save_strategy": (*_INTERVALS, "best"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "lr_scheduler_type": (
        *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
        *("inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr"),
        *("warmup_stable_decay", "greedy"),
    ),
    "include_num_input_tokens_seen": ("no", "all", "non_padding", "True", "False", "true", "false"),
    "log_level": ("debug", "info", "warning", "error", "critical", "passive", "detail"),
    "log_level_replica": ("debug", "info", "warning", "error", "critical", "passive", "detail"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"),
}
"""What a field of text may be, where it is not free."""

POSITIVE = frozenset(
    {
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "num_train_epochs", "eval_steps", "save_steps", "logging_steps", "save_total_limit"),
        *("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"),
        *("ddp_bucket_cap_mb", "neftune_noise_alpha"),
    }
)
AT_LEAST_0 = frozenset(
    {"max_grad_norm", "weight_decay", "warmup_steps", "adam_epsilon", "eval_delay", "dataloader_num_workers"}
)
SEEDS = frozenset({"seed", "data_seed"})
UP_TO_1 = frozenset({"label_smoothing_factor"})
BELOW_1 = frozenset({"adam_beta1", "adam_beta2"})

MAY_CHANGE: frozenset[str] = frozenset(
    {
        # Where things lie, and what the command is to do with what it finds.
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seeds", "cache_dir", "result_file"),
        # Logging.
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
        *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name"),
        *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics"),
        # When checkpoints are saved, and how many are kept.
        *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node"),
        # Workers, devices and processes. A batch may be divided otherwise; the whole of it is compared.
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "use_cpu", "torch_empty_cache_steps"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout", "per_device_eval_batch_size", "eval_accumulation_steps"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "ignore_data_skip"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    }
)
"""Settings, of any kind, with which a run may be given again; any other must be as it was begun with."""
