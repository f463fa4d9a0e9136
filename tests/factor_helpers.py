"""Small runs of the methods with low-rank factors."""

FACTORS = {
    "lora": {"method": "lora", "rank": 4, "lora_alpha": 4, "lora_plus_ratio": 4, "weight_decay": 0.1},
    "relora": {
        **{"method": "relora", "rank": 4, "relora": 5, "cycle_length": 5, "scheduler": "cosine_restarts"},
        **{
            "lora_alpha": 4,
            "restart_warmup_steps": 1,
            "optimizer_random_pruning": 0.5,
            "train_scaling": True,
            "lora_dropout": 0.1,
        },
    },
    "switchlora": {
        **{"method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2},
        **{"switch_lora_descent_rate": 0.9, "weight_decay": 0.1},
    },
    "switchlora at random": {
        **{"method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2},
        **{"switch_lora_descent_rate": 0.9, "discontinuous_switch": True, "switch_lora_drop": 0.3},
    },
    "golore_adapter": {"method": "golore_adapter", "rank": 4, "update_proj_gap": 5, "rand_ratio": 0.5, "scale": 0.5},
}
