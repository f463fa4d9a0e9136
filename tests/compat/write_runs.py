"""Writes the run folders of `test_compat.py`, each stopped half-way, with the code of another checkout.

    python tests/compat/write_runs.py OTHER_CHECKOUT tests/compat/runs

The folders in `runs/` were written by commit 598c975, the last one before checkpoints had a format number and a run id.
They are never written anew: what they were must be readable for ever.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline")

STOPPED, LAST = 5, 10
"""Updates in the stored folder, and in the whole run."""

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}

FACTORS = {"rank": 4, "lora_alpha": 4}
METHODS = {
    "full_rank": {},
    "galore": {"rank": 4, "update_proj_gap": 3},
    "golore": {"rank": 4, "update_proj_gap": 3, "rand_ratio": 0.4},
    "online_subspace_descent": {"rank": 4, "update_proj_gap": 3},
    "lora": FACTORS,
    "relora": {**FACTORS, "relora": 4},
    "switchlora": {**FACTORS, "switch_lora_interval": 12},
    "golore_adapter": {"rank": 4, "update_proj_gap": 3, "rand_ratio": 0.4, "scale": 0.5},
}


def command(method: str, folder: Path, model: Path, data: Path, **changes) -> list[str]:
    """The command line of a method's run."""
    settings = {
        "model_config": model,
        "dataset_path": data,
        "save_dir": folder,
        "method": method,
        "batch_size": 2,
        "total_batch_size": 4,
        "dtype": "float32",
        "lr": 1e-2,
        "num_training_steps": LAST,
        "warmup_steps": 2,
        "eval_every": 5,
        "save_every": 5,
        "workers": 0,
        **METHODS[method],
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def digest(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's exported weights, by name."""
    import hashlib

    from safetensors.torch import load_file

    found = hashlib.sha256()
    for name, tensor in sorted(load_file(checkpoint / "model.safetensors").items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def main(checkout: str, out: str) -> None:
    sys.path[:0] = [checkout, str(Path(checkout) / "tests")]
    import helpers
    from conftest import write_blocks

    out = Path(out)
    out.mkdir(parents=True)
    data, model = write_blocks(out / "data", train=64, validation=8, block=16, vocabulary=32), out / "llama.json"
    model.write_text(json.dumps(SHAPE, indent=2) + "\n")
    digests = {}
    for method in METHODS:
        whole = out / "whole"
        assert helpers.run(command(method, whole, model, data)) == 0
        digests[method] = digest(whole / f"model_{LAST}")
        shutil.rmtree(whole)
        helpers.stop_after(STOPPED, command(method, out / method, model, data))
    (out / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
