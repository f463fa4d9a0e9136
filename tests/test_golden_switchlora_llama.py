"""20 updates of a small LLaMA with SwitchLoRA, through the real trainer, against the public implementation's."""

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from conftest import write_blocks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_pretraining.nn import low_rank_layers
from peft_pretraining.training import build

GOLDEN = Path(__file__).parent / "golden" / "switchlora" / "tiny_llama_f32"
NUMBERS, CASE = load_file(GOLDEN.with_suffix(".safetensors")), json.loads(GOLDEN.with_suffix(".json").read_text())
TOLERANCE = {"rtol": 0, "atol": 1e-4}
SNAPSHOTS = (1, 2, 3, 5, 8, 12, 20)

OURS = {  # what the public names are called here, and how integers of ours become theirs
    "selected_A_indices_param": "switching.selected_A",
    "selected_B_indices_param": "switching.selected_B",
    "fixed_A_steps_param": "switching.frozen_A",
    "fixed_B_steps_param": "switching.frozen_B",
    "candidates_A": "switching.candidates_A",
    "candidates_B": "switching.candidates_B",
}


class Observer:
    """Gives the trainer the public run's start, data and random numbers, and keeps what each update left."""

    def __init__(self, train):
        self.train, self.after, self.done = train, {}, {}
        self.uniforms = np.random.RandomState(0).random_sample((20, 14))

    def __call__(self, run):
        self.run, state = run, run.model.state_dict()
        layers = list(low_rank_layers(run.model))
        columns = [CASE["adapter_order"].index(name) for name in layers]
        if run.state.update_step == 0:
            self.copy_in(state, layers)
        first = 2 * run.state.update_step
        run.batches = iter([{"input_ids": tokens} for tokens in NUMBERS["data"][first:]])
        run.method.uniform = lambda step, index: self.uniforms[step, columns[index]]
        plan = run.method.plan

        def observed_plan(layer, step, index):
            switch = plan(layer, step, index)
            self.done[step, columns[index]] = len(switch.slots_a)
            return switch

        def observed_after(*_):
            self.after[run.optimizer.update_step + 1] = self.snapshot()

        run.method.plan = observed_plan
        run.optimizer.register_step_post_hook(observed_after)
        return self.train(run)

    def copy_in(self, state, layers):
        for name, value in NUMBERS.items():
            if not name.startswith("init."):
                continue
            owner, _, last = name.removeprefix("init.").rpartition(".")
            ours = f"{owner}.{OURS.get(last, last)}"
            if ours in state:
                state[ours].copy_(value)
        for layer in layers:
            pointers = [int(NUMBERS[f"init.{layer}.candidate_{factor}_index_param"]) for factor in "AB"]
            state[f"{layer}.switching.pointers"].copy_(torch.tensor(pointers))

    def snapshot(self):
        run = self.run
        state = {name: tensor.cpu().clone() for name, tensor in run.model.state_dict().items()}
        for name, parameter in run.model.named_parameters():
            for key, value in run.optimizer.state[parameter].items():
                state[f"{name}::{key}"] = value.cpu().clone()
        return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_blocks(folder / "data", train=80, validation=2, block=12, vocabulary=40)
    shape = {**CASE["config"], "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "llama.json").write_text(json.dumps(shape))
    return folder


def command(folder, name):
    hyper = CASE["hyper"]
    flags = {
        **{"model_config": folder / "llama.json", "dataset_path": folder / "data", "save_dir": folder / name},
        **{"batch_size": hyper["micro"], "gradient_accumulation": hyper["accum"], "lr": hyper["lr"]},
        **{"num_training_steps": hyper["total"], "warmup_steps": hyper["warmup"], "clip_grad_norm": hyper["clip"]},
        **{"rank": hyper["rank"], "switch_lora_interval": hyper["interval"], "adam_warm_step": hyper["warm"]},
        **{"switch_lora_descent_rate": hyper["descent_rate"], "workers": 0, "eval_every": 100, "dtype": "float32"},
    }
    return ["--switch_lora", *(str(part) for flag, value in flags.items() for part in (f"--{flag}", value))]


@pytest.fixture(scope="module")
def observed(folder, device):
    with pytest.MonkeyPatch.context() as patch:
        observer = Observer(build.train)
        patch.setattr(build, "train", observer)
        assert helpers.run(command(folder, "at once")) == 0
    return observer


def test_losses_norms_rates_and_counts(observed, folder):
    updates = helpers.updates(folder / "at once")
    assert [row[1] for row in updates] == pytest.approx(NUMBERS["trace.micro_loss"].mean(1).tolist(), abs=1e-4)
    assert [row[2] for row in updates] == pytest.approx(NUMBERS["trace.lr"].tolist(), abs=1e-12)
    assert [row[3] for row in updates] == pytest.approx(NUMBERS["trace.grad_norm"].tolist(), abs=1e-4)
    done = [[observed.done[step, column] for column in range(14)] for step in range(20)]
    assert done == NUMBERS["trace.k_done"].tolist()


@pytest.mark.parametrize("update", SNAPSHOTS)
def test_state_after(observed, update):
    ours, compared = observed.after[update], 0
    for name, expected in NUMBERS.items():
        if not name.startswith(f"after{update}."):
            continue
        owner, _, last = name.removeprefix(f"after{update}.").rpartition(".")
        if last.startswith("candidate_") and last.endswith("_index_param"):
            actual = ours[f"{owner}.switching.pointers"]["AB".index(last[len("candidate_")])]
        else:
            actual = ours[f"{owner}.{OURS.get(last, last)}"]
        compared += 1
        if not expected.is_floating_point() or last.endswith("::step"):
            assert actual.flatten().tolist() == expected.flatten().tolist(), name
        else:
            torch.testing.assert_close(actual, expected, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert compared > 14 * 15


def test_the_exported_model(observed, folder, device):
    """It is plain, and computes what the public run's merged model computes."""
    exported = folder / "at once" / "model_20"
    for name, value in load_file(exported / "model.safetensors").items():
        if f"merged.{name}" in NUMBERS:
            torch.testing.assert_close(value, NUMBERS[f"merged.{name}"], **TOLERANCE)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokens = NUMBERS["data"][0]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        trained = observed.run.model.eval()(input_ids=tokens.to(device)).logits.cpu()
    torch.testing.assert_close(logits, NUMBERS["merged_logits"], **TOLERANCE)
    torch.testing.assert_close(trained, NUMBERS["final_eval_logits"], **TOLERANCE)
    torch.testing.assert_close(logits, trained, rtol=0, atol=1e-5)


def test_resumed_in_the_middle_of_a_freeze(observed, folder, monkeypatch):
    resumed = Observer(build.train)
    monkeypatch.setattr(build, "train", resumed)
    argv = command(folder, "resumed")
    helpers.stop_after(7, argv)
    frozen = [helpers.tensors(folder / "resumed" / "model_7")[f"model.{name}.switching.frozen_A"]
              for name in low_rank_layers(resumed.run.model)]  # fmt: skip
    assert sum(int(counters.sum()) for counters in frozen) > 0
    assert helpers.run([*argv, *helpers.RESUME]) == 0
    assert resumed.after[20].keys() == observed.after[20].keys()
    assert all(torch.equal(resumed.after[20][name], value) for name, value in observed.after[20].items())
    helpers.assert_same_run(folder / "resumed", folder / "at once")
