"""Fine-tuning on two processes is fine-tuning on one with twice the batch."""

import json
import subprocess
import sys

import pytest
import torch
from finetune_helpers import glue_flags, rows, write_bert, write_rows
from helpers import PROJECT, child_environment, last_words
from safetensors.torch import load_file

METHODS = {
    "full_rank": {"method": "full_rank"},
    "lora": {"method": "lora"},
    "galore": {"method": "galore", "update_proj_gap": 2},
    "online_subspace_descent": {"method": "online_subspace_descent", "update_proj_gap": 2},
    "golore_adapter": {"enable_golore": True, "update_proj_gap": 2, "rand_ratio": 0.5},
    "switchlora": {"switch_lora": True, "switch_lora_interval": 10},
}


pytestmark = pytest.mark.slow  # one launch makes all the runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """All methods on one process and on two; without dropout, whose draws differ."""
    from peft_pretraining.finetune import glue

    base = tmp_path_factory.mktemp("ranks")
    model = write_bert(base / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    common = {
        **{"model_name_or_path": model, "task_name": "sst2", "do_train": True, "do_eval": True, "max_steps": 5},
        **{"train_file": write_rows(base / "train.jsonl", rows("sst2", 40, seed=1)), "use_cpu": True, "rank": 4},
        **{"validation_file": write_rows(base / "validation.jsonl", rows("sst2", 16, seed=2)), "max_length": 16},
        **{"save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3, "lora_all_modules": True},
    }
    cases = []
    for name, flags in METHODS.items():
        own = {**common, **flags}
        glue.run(glue_flags(**own, per_device_train_batch_size=8, output_dir=base / f"{name}_1"))
        cases.append({**own, "per_device_train_batch_size": 4, "output_dir": base / f"{name}_2"})
    (base / "cases.json").write_text(json.dumps(cases, default=str))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(PROJECT / "tests" / "finetune_ranks.py"), str(base / "cases.json")]
    done = subprocess.run(command, cwd=PROJECT, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, last_words(done.stderr)
    return base


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one_with_twice_the_batch(name, folders):
    results = [json.loads((folders / f"{name}_{count}" / "all_results.json").read_text()) for count in (1, 2)]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-3)
    assert results[0]["eval_samples"] == results[1]["eval_samples"] == 16
    one, two = (load_file(folders / f"{name}_{count}" / "model.safetensors") for count in (1, 2))
    # No loss depends on the keys' biases: their gradients are rounding errors, whose signs AdamW follows.
    for key in [key for key in one if not key.endswith("key.bias")]:  # five updates of 1e-3 move a weight by up to 5e-3
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=2e-4, msg=f"{name}: {key}")
