"""The optimizer under transformers' `Trainer`, with a checkpoint and a resume in the middle."""

import pytest
import torch
from projection_helpers import RULES
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft_pretraining import optim
from peft_pretraining.optim import LowRankOptimizer

STEPS, SAVE = 7, 4


def low_rank(rule, group):
    """A function that makes the optimizer of a model, of groups by hand."""

    def make(model):
        named = dict(model.named_parameters())
        projected = {name for name in named if "proj" in name}
        groups = [
            {"params": [(name, param) for name, param in named.items() if name not in projected]},
            {"params": [(name, named[name]) for name in sorted(projected)], "rank": 4, "update_proj_gap": 3, **group},
        ]
        return LowRankOptimizer(groups, **RULES[rule], lr=0.01)

    return make


def of_method(name, **settings):
    return lambda model: getattr(optim, name).from_model(model, lr=0.01, **settings)


def trainer(folder, make):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    ))  # fmt: skip
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    tokens = torch.randint(64, (4 * STEPS, 16), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=SAVE, per_device_train_batch_size=2, report_to="none",
        gradient_accumulation_steps=2, use_cpu=True, disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler)), model, optimizer


SMALL = {"rank": 4, "update_proj_gap": 3}
OPTIMIZERS = {
    "adamw": low_rank("adamw", {"scale": 0.25}),
    "muon": of_method("Muon"),
}
SLOW = {
    "adamw8bit": low_rank("adamw8bit", {"rand_ratio": 0.5, "num_training_steps": STEPS}),
    "adafactor": low_rank("adafactor with beta1", {"proj_type": "continuous", "scale": 0.25}),
    "alice": of_method("Alice", leading=2, **SMALL),
    "apollo": of_method("Apollo", **SMALL),
    "fira": of_method("Fira", **SMALL),
    "stable_spam": of_method("StableSPAM", gap=3, total=STEPS),
    "scale": of_method("Scale"),
    "soap": of_method("SOAP", gap=2),
    "adam_mini": of_method("AdamMini"),
    "ldadam": of_method("LDAdam", rank=4),
    "frugal": of_method("Frugal", update_proj_gap=3),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_trainer_saves_and_resumes_it(name, tmp_path):
    make = {**OPTIMIZERS, **SLOW}[name]
    whole, model, optimizer = trainer(tmp_path, make)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    whole.train()
    assert all(not torch.equal(start[name], param) for name, param in model.named_parameters())
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS}
    resumed, again, other = trainer(tmp_path, make)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVE}"))
    for (param, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), param
    assert {int(state["step"]) for state in other.state.values()} == {STEPS}
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.01 / (1 + step) for step in range(STEPS)])
