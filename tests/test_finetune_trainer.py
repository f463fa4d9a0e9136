"""The training methods under transformers' `Trainer`: the same updates, resumable bit by bit, exported merged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from finetune_helpers import glue_flags, rows, run_glue, write_bert, write_llama, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, set_seed

from peft_pretraining.finetune import glue
from peft_pretraining.finetune.checkpoints import METHOD_STATE, TRAINING_WEIGHTS
from peft_pretraining.finetune.targets import target_modules
from peft_pretraining.finetune.trainer import MethodTrainer
from peft_pretraining.flags import ConfigError

METHODS = {
    "full_rank": {"method": "full_rank"},
    "lora": {"method": "lora"},
    "relora": {"method": "relora", "relora": 3},
    "switchlora": {"switch_lora": True, "switch_lora_interval": 10},
    "galore": {"enable_galore": True, "update_proj_gap": 3},
    "galore per layer": {"optimizer": "galore_adamw_per_layer", "update_proj_gap": 3, "gradient_accumulation_steps": 1},
    "golore": {"optimizer": "golore_adamw", "update_proj_gap": 3, "rand_ratio": 0.5},
    "golore_adapter": {"enable_golore": True, "update_proj_gap": 3, "rand_ratio": 0.5},
    "online_subspace_descent": {"enable_galore": True, "proj_type": "continuous", "update_proj_gap": 3},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2")
    return {
        **{"task_name": "sst2", "train_file": write_rows(folder / "train.jsonl", rows("sst2", 40, seed=1))},
        "validation_file": write_rows(folder / "validation.jsonl", rows("sst2", 16, seed=2)),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def slow_unless(*names: str) -> list:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("name", slow_unless("galore", "golore_adapter", "switchlora"))
def test_resume_in_the_middle_changes_no_bit(name, bert, data, tmp_path):
    """With dropout, accumulation and decay; the checkpoint lies between two refreshes, and within a freeze."""
    flags = {
        **{"model_name_or_path": bert, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "rank": 4},
        **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3},
        **{"weight_decay": 0.1, "lora_all_modules": True, "do_eval": False, "scale": None, **data, **METHODS[name]},
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_glue(**flags, output_dir=whole)
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    results = run_glue(**flags, output_dir=resumed)  # goes on from the newest checkpoint in the folder
    assert results["train_steps"] == 8
    assert_same_weights(whole, resumed)
    before, after = weights(whole / "checkpoint-4"), weights(whole)
    assert any(not torch.equal(before[key], after[key]) for key in after)
    if name == "switchlora":
        state = load_file(whole / "checkpoint-4" / TRAINING_WEIGHTS)
        assert any((tensor > 0).any() for key, tensor in state.items() if "frozen_" in key)
    assert (whole / "checkpoint-4" / TRAINING_WEIGHTS).is_file() == ("lora" in name or name == "golore_adapter")
    for file in (whole / "checkpoint-4").glob("*.pt"):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", slow_unless("full_rank", "lora", "galore", "golore_adapter", "switchlora"))
def test_every_method_learns_and_exports_a_plain_model(name, bert, data, tmp_path):
    flags = {**data, **METHODS[name], "update_proj_gap": 10, "model_name_or_path": bert, "output_dir": tmp_path / "out"}
    flags |= {"relora": 15} if name == "relora" else {}
    results = run_glue(**flags, max_steps=45, learning_rate=5e-3, rank=4, lora_all_modules=True)
    losses = [
        entry["loss"]
        for entry in json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert len(losses) == 45 and sum(losses[-5:]) < 0.6 * sum(losses[:5])
    # The folder alone, through transformers alone, gives the numbers that were reported.
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    content = rows("sst2", 16, seed=2)
    encoded = tokenizer([row["sentence"] for row in content], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in content])
    with torch.no_grad():
        output = model.eval()(**encoded, labels=labels)
    assert (output.logits.argmax(-1) == labels).float().mean().item() == pytest.approx(results["eval_accuracy"])
    assert output.loss.item() == pytest.approx(results["eval_loss"], rel=1e-4)
    assert results["optimizer_state_bytes"] > 0 and results["method"] in name.replace(" per layer", "")


def trainer_for(bert, data, tmp_path, model=None, **flags) -> MethodTrainer:
    """A trainer over rows of random tokens."""
    defaults = {
        **{"model_name_or_path": bert, "output_dir": tmp_path / "out", "max_steps": 6, "learning_rate": 1e-2},
        **{"per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "rank": 4},
    }
    finetuning = glue.parse(glue_flags(**{**defaults, **data, **flags}))
    set_seed(0)
    model = model or AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    return MethodTrainer(finetuning, model, train_dataset=token_rows())


def token_rows(count: int = 32) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(48, (8,), generator=generator).tolist(), "labels": i % 2} for i in range(count)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_full_rank_is_what_the_plain_trainer_does(decay, bert, data, tmp_path):
    ours = trainer_for(bert, data, tmp_path, weight_decay=decay, max_grad_norm=0.5)
    ours.train()
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    Trainer(model, ours.args, train_dataset=token_rows()).train()
    for (name, one), (_, two) in zip(model.named_parameters(), ours.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)


def test_decay_spares_biases_and_norms(bert, data, tmp_path):
    for method in ("galore", "lora", "switchlora"):
        trainer = trainer_for(bert, data, tmp_path, method=method, weight_decay=0.1, lora_all_modules=True)
        optimizer = trainer.create_optimizer()
        names = {param: name for name, param in trainer.model.named_parameters()}
        groups = {names[param]: group for group in optimizer.param_groups for param in group["params"]}
        assert groups.keys() == {name for name, param in trainer.model.named_parameters() if param.requires_grad}
        for name, group in groups.items():
            spared = name.endswith("bias") or "LayerNorm" in name
            assert group["weight_decay"] == (0.0 if spared else 0.1), (method, name)


@pytest.mark.parametrize("method", ["full_rank", "galore", "golore_adapter", "switchlora"])
def test_accumulated_micro_batches_are_one_batch(method, bert, data, tmp_path):
    def run(**flags):
        plain = AutoModelForSequenceClassification.from_pretrained(
            bert, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        with torch.no_grad():
            plain.classifier.weight.copy_(torch.linspace(-1, 1, 64).view(2, 32))
        flags |= {"switch_lora_interval": 10, "update_proj_gap": 2, "learning_rate": 1e-3}
        trainer = trainer_for(bert, data, tmp_path, plain.double(), method=method, **flags)
        trainer.train()
        return trainer.model.state_dict()

    one, several = run(per_device_train_batch_size=8), run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name in one:
        torch.testing.assert_close(one[name], several[name], rtol=1e-6, atol=1e-8, msg=name)


def test_golore_knows_the_number_of_updates(bert, data, tmp_path):
    trainer = trainer_for(bert, data, tmp_path, enable_golore=True, max_steps=-1, num_train_epochs=3)
    assert trainer.method_config.schedule.num_training_steps == 24  # 32 rows, batch 4, 3 epochs


@pytest.mark.parametrize("method", ["full_rank", "galore", "switchlora"])
def test_update_with_an_infinite_gradient_is_skipped(method, bert, data, tmp_path):
    trainer = trainer_for(bert, data, tmp_path, method=method, max_steps=3)
    seen = []
    compute_loss, step = trainer.compute_loss, trainer.after_optimizer_step

    def poisoned(*arguments, **keywords):
        loss = compute_loss(*arguments, **keywords)
        return loss * float("inf") if trainer.state.global_step == 1 else loss

    def watched():
        seen.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        step()

    trainer.compute_loss, trainer.after_optimizer_step = poisoned, watched
    trainer.train()
    first, second, third = seen
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in third.values())


def test_targets_of_bert_and_llama(bert, data, tmp_path):
    llama = AutoModelForSequenceClassification.from_pretrained(write_llama(tmp_path / "llama"), num_labels=2)
    encoder = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)

    def projected(model, **flags):
        arguments = {"output_dir": tmp_path, "model_name_or_path": bert, "enable_galore": True, **data, **flags}
        wanted = target_modules(model, glue.parse(glue_flags(**arguments)))
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        return {name for name in linears if any(target in name for target in wanted)}

    layer = "bert.encoder.layer.{}."
    assert projected(encoder) == {layer.format(i) + "attention.self.query" for i in range(2)}
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    parts += ("intermediate.dense", "output.dense")
    assert projected(encoder, lora_all_modules=True) == {layer.format(i) + part for i in range(2) for part in parts}
    layer = "model.layers.{}."
    assert projected(llama) == {layer.format(i) + f"self_attn.{part}_proj" for i in range(2) for part in "qv"}
    parts = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
    assert projected(llama, lora_all_modules=True) == {layer.format(i) + part for i in range(2) for part in parts}
    assert projected(encoder, target_modules="pooler") == {"bert.pooler.dense"}
    with pytest.raises(ConfigError, match="--target_modules"):
        projected(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("method", ["galore", "golore_adapter"])
def test_best_model_is_the_one_that_is_kept(method, bert, data, tmp_path):
    """Evaluated on rows with the wrong labels, a model only gets worse."""
    wrong = [{**row, "label": 1 - row["label"]} for row in rows("sst2", 16, seed=2)]
    flags = {**data, "validation_file": write_rows(tmp_path / "wrong.jsonl", wrong), "method": method}
    results = run_glue(
        **flags, model_name_or_path=bert, output_dir=tmp_path / "out", load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, save_total_limit=1, max_steps=12,
        learning_rate=5e-3, lora_all_modules=True, rank=4, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry][:3]
    assert losses == sorted(losses) and losses[0] < losses[2] - 0.1
    assert results["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert results["best_metric"] == losses[0]
    kept = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert kept == ["checkpoint-4"]
    assert_same_weights(tmp_path / "out", tmp_path / "out" / kept[0])


def test_checkpoint_of_another_method_is_refused(bert, data, tmp_path, capsys):
    import run_glue as script

    flags = {**data, "model_name_or_path": bert, "output_dir": tmp_path, "do_train": True, "use_cpu": True, "rank": 4}
    flags |= {"max_steps": 2, "save_steps": 1, "disable_tqdm": True, "max_length": 16}
    assert script.main(glue_flags(**flags, method="lora")) == 0
    assert json.loads((tmp_path / "checkpoint-2" / METHOD_STATE).read_text())["identity"]["method"] == "lora"
    assert script.main(glue_flags(**flags, method="galore")) == 2
    assert "method 'lora' instead of 'galore'" in capsys.readouterr().err
    assert script.main(glue_flags(**{**flags, "rank": 2}, method="lora")) == 2
    assert "rank 4 instead of 2" in capsys.readouterr().err
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()  # as if the save had been cut off
    assert script.main(glue_flags(**flags, method="lora")) == 0
    assert script.main(glue_flags(**flags, method="galore", overwrite_output_dir=True)) == 0


def test_autocast_in_bfloat16_trains_factors(bert, data, tmp_path):
    trainer = trainer_for(bert, data, tmp_path, enable_golore=True, update_proj_gap=2, max_steps=3)
    trainer.compute_loss_context_manager = lambda: torch.autocast("cpu", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(before[name], tensor)]
    assert any("lora_" in name for name in changed)
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_settings_that_do_not_go_with_the_model_are_bad_input(bert, data, tmp_path, monkeypatch):
    from peft_pretraining.methods.full_rank.method import FullRank

    def unfit(method, model):
        raise ValueError("target_modules: 'mpl' matches\nnothing")

    monkeypatch.setattr(FullRank, "convert", unfit)
    with pytest.raises(ConfigError) as error:
        trainer_for(bert, data, tmp_path, method="full_rank")
    assert error.value.problems == ["target_modules: 'mpl' matches nothing"]


def test_text_that_spells_special_tokens_is_text(tmp_path):
    """GLUE's texts have the tokens that pre-training's documents have."""
    from finetune_helpers import write_tokenizer

    from peft_pretraining.data.plain_text import PlainText
    from peft_pretraining.finetune.glue_model import encoder
    from peft_pretraining.finetune.glue_tasks import GLUE_TASKS

    for kind, begin, end in (("bert", 1, 1), ("llama", 0, 1)):
        write_tokenizer(tmp_path / kind, kind)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        texts = ["w1 </s> w2", "[SEP] w3 [CLS]", "<pad>w4[PAD]", 'w5 "\0\r\n']
        encode = encoder(tokenizer, GLUE_TASKS["sst2"], 64, False, 48)
        found = encode({"sentence": texts, "label": [0] * len(texts)})["input_ids"]
        wanted = list(PlainText(tokenizer)(texts))
        assert [ids[begin : len(ids) - end] for ids in found] == wanted
        assert not {token for ids in wanted for token in ids} & (
            set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        )
