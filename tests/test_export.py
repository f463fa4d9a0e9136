"""`python -m peft_pretraining.export`: the merged model, the adapter over its base, the card; and `generate`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import shutil
from pathlib import Path

import helpers
import pytest
import torch
import yaml
from conftest import write_blocks, write_model
from safetensors.torch import load_file, save_file
from test_prompt_tokenizer import t5
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pretraining import export, generate

FACTORS = {
    "lora": {"method": "lora", "rank": 4, "lora_alpha": 6},
    "own scales": {"method": "lora", "rank": 4, "train_scaling": True},
    "without W": {"method": "lora", "rank": 4, "lora_only": True},
    "small layers": {"method": "relora", "rank": 40, "relora": 3, "target_modules": "q_proj,up_proj"},
    "switchlora": {"method": "switchlora", "rank": 8, "switch_lora_interval": 4, "adam_warm_step": 1},
    "golore_adapter": {"method": "golore_adapter", "rank": 4, "update_proj_gap": 2},
}
TOKENS = torch.arange(48).reshape(2, 24)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of small runs with T5's tokenizer, each made once."""
    data = write_blocks(tmp_path_factory.mktemp("data") / "data", dataset="allenai/c4", dataset_config="en")
    t5().save_pretrained(data)
    (data / "spiece.model").write_bytes(b"sentences")
    model = write_model(tmp_path_factory.mktemp("shape") / "llama_x.json", num_key_value_heads=1)
    made = {}

    def run(**flags) -> Path:
        if (key := tuple(sorted(flags.items()))) not in made:
            settings = {
                "model_config": model,
                "dataset_path": data,
                "save_dir": tmp_path_factory.mktemp("runs") / "run",
            }
            settings |= {"batch_size": 4, "total_batch_size": 4, "lr": 1e-2, "warmup_steps": 0, "workers": 0}
            settings |= {"num_training_steps": 4, "eval_every": 4, "save_every": 4, **flags}
            argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            assert helpers.run(argv) == 0
            made[key] = settings["save_dir"]
        return made[key]

    return run


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


SLOW = ("own scales", "without W", "golore_adapter")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FACTORS])
def exported(request, trained, tmp_path) -> Path:
    """A folder with the merged model and the adapter of one run."""
    run = trained(**FACTORS[request.param])
    assert export.main([str(run / "model_4"), str(tmp_path / "merged")]) == 0
    assert export.main([str(run), str(tmp_path / "adapter"), "--adapter"]) == 0
    return tmp_path


def test_an_adapter_and_its_base_are_the_merged_model(exported):
    """By PEFT's formula: W + lora_alpha / r · B·A, with the numbers of the layer or of most."""
    config = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    factors = load_file(exported / "adapter" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(exported / "adapter" / "base")
    merged = AutoModelForCausalLM.from_pretrained(exported / "merged")
    assert not torch.allclose(logits(base), logits(merged), atol=1e-3)
    for name in {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in factors}:
        a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        key = name.replace(".", r"\.")
        rank = config["rank_pattern"].get(key, config["r"])
        alpha = config["alpha_pattern"].get(key, config["lora_alpha"])
        assert a.shape[0] == rank == b.shape[1]
        assert any(name == target or name.endswith(f".{target}") for target in config["target_modules"])
        base.get_submodule(name).weight.data += alpha / rank * b @ a
    torch.testing.assert_close(logits(base), logits(merged), rtol=0, atol=2e-6)


def test_peft_loads_the_adapter(exported):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    base = AutoModelForCausalLM.from_pretrained(exported / "adapter" / "base")
    expected = logits(AutoModelForCausalLM.from_pretrained(exported / "merged"))
    adapted = peft.PeftModel.from_pretrained(base, exported / "adapter")
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=0, atol=2e-6)
    itself = peft.AutoPeftModelForCausalLM.from_pretrained(exported / "adapter")
    torch.testing.assert_close(logits(itself), expected, rtol=0, atol=2e-6)


def test_an_adapter_of_a_16_bit_run_has_the_weights_that_were_trained(trained, tmp_path):
    """The base of float32 has, beyond these, what rounding has taken from the frozen weights."""
    checkpoint = trained(method="relora", rank=4, relora=2, dtype="bfloat16") / "model_4"
    for out, flags in (("as trained", []), ("float32", ["--dtype", "float32"])):
        assert export.main([str(checkpoint), str(tmp_path / out), "--adapter", *flags]) == 0
    bases = [load_file(tmp_path / out / "base" / "model.safetensors") for out in ("as trained", "float32")]
    assert all(torch.equal(bases[0][name], exact.bfloat16()) for name, exact in bases[1].items())
    assert any(not torch.equal(exact, exact.bfloat16().float()) for exact in bases[1].values())
    config = json.loads((tmp_path / "float32" / "base" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_a_method_without_factors_has_no_adapter(trained, tmp_path, capsys):
    assert export.main([str(trained(method="galore", rank=4)), str(tmp_path / "out"), "--adapter"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line == "error: --adapter: method galore trains whole weights, not factors beside them"
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_was_trained(trained, tmp_path):
    run = trained(**FACTORS["lora"])
    assert export.main([str(run), str(tmp_path / "out"), "--license", "apache-2.0"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["license"] == "apache-2.0" and about["library_name"] == "transformers"
    assert about["datasets"] == ["allenai/c4"] and "lora" in about["tags"] and "base_model" not in about
    (result,) = about["model-index"][0]["results"]
    last = helpers.records(run)[-1]
    assert result["metrics"] == [{"type": "perplexity", "value": last["final_eval_perplexity"]}]
    for row in (
        "| licence | apache-2.0 |",
        "| base model | none: the weights started at random |",
        "| data | c4 en |",
        "| trained | 4 updates, 1,024 tokens |",
        "| `lora_alpha` | 6 |",
        "| `lr` | 0.01 |",
    ):
        assert row in body, row
    assert f"perplexity {last['final_eval_perplexity']:.2f} over" in body
    assert "[arXiv 2106.09685](https://arxiv.org/abs/2106.09685)" in body and str(run) not in card


def test_a_card_claims_no_other_runs_evaluation(trained, tmp_path):
    shutil.copytree(trained(**FACTORS["lora"]) / "model_4", tmp_path / "run" / "model_4")
    shutil.copy(trained(method="galore", rank=4) / "metrics.jsonl", tmp_path / "run")
    shutil.copy(trained(method="galore", rank=4) / "config.yaml", tmp_path / "run")
    assert export.main([str(tmp_path / "run" / "model_4"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation | was not evaluated |" in card and "model-index" not in card


def test_a_trained_model_on_the_hub_is_the_base_model(trained, tmp_path):
    from peft_pretraining.exporting import card
    from peft_pretraining.exporting.trained import Trained

    checkpoint = trained(**FACTORS["lora"]) / "model_4"
    read = Trained.read(checkpoint)
    config = read.config.replace(model_name_or_path="meta-llama/Llama-3.2-1B", model_config=None)
    text = card.About.of(checkpoint, config, read.plain, "llama3.2").text(read.plain, as_adapter=False)
    assert "base_model: meta-llama/Llama-3.2-1B" in text and "| base model | `Llama-3.2-1B` |" in text


def test_an_export_that_fails_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        (tmp_path / "out" / "half").write_text("half a model")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert export.main([str(trained(**FACTORS["lora"])), str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path / 'out'}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_of_a_run_the_newest_good_checkpoint_is_taken(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained(**FACTORS["lora"]), tmp_path / "run"))
    shutil.copytree(run / "model_4", run / "model_6")
    (run / "model_6" / "config.json").write_text("{}")
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    assert "model_6: config.json is truncated" in capsys.readouterr().err
    assert "4 updates" in (tmp_path / "out" / "README.md").read_text()


# Going on with a text.


def said(*argv: str, stdin: str = "") -> tuple[int, str]:
    with pytest.MonkeyPatch().context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.stdin", io.StringIO(stdin))
        return generate.main(list(argv)), out.getvalue()


def test_generate_goes_on_with_the_text(trained):
    """As transformers' own pipeline does, with the same tokens."""
    from transformers import pipeline

    run = str(trained(**FACTORS["lora"]))
    code, text = said(run, "the cat", "--greedy", "--max_new_tokens", "5")
    folder = f"{run}/model_4"
    theirs = pipeline("text-generation", model=folder, tokenizer=folder)
    (answer,) = theirs("the cat", max_new_tokens=5, do_sample=False, return_tensors=True)
    assert code == 0 and text.startswith("the cat ")
    assert text.rstrip("\n") == theirs.tokenizer.decode(answer["generated_token_ids"])


def test_generate_reads_lines_and_draws_the_same_again(trained):
    run = str(trained(**FACTORS["lora"]))
    first, again, other = (said(run, "--seed", seed, stdin="the cat\n\nthe dog\n") for seed in ("1", "1", "2"))
    assert first == again != other
    assert [line.startswith(f"the {name}") for line, name in zip(first[1].splitlines(), ("cat", "dog"), strict=True)]


def test_an_empty_text_is_a_documents_beginning(trained, monkeypatch):
    model, tokenizer = generate.load(str(trained(**FACTORS["lora"])))
    prompts = []
    monkeypatch.setattr(model, "generate", lambda ids, **how: prompts.append(ids.tolist()) or ids)
    generate.generate(model, tokenizer, "", 1, 0)
    generate.generate(model, tokenizer, "the </s>", 1, 0)
    assert prompts[0] == [[tokenizer.eos_token_id]] and prompts[1][0][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nowhere", "a"], "the model of nowhere cannot be loaded: "),
        (["nowhere", "a", "--top_p", "1.5"], "argument --top_p: must be at most 1, got '1.5'"),
        (["nowhere", "a", "--max_new_tokens", "0"], "argument --max_new_tokens: must be a positive integer, got '0'"),
    ],
)
def test_what_cannot_be_generated_is_one_line(argv, line, capsys):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        code = generate.main(argv)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and line in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_lacks_weights_is_not_completed_at_random(trained, tmp_path, capsys):
    shutil.copytree(trained(**FACTORS["lora"]) / "model_4", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert generate.main([str(tmp_path / "model"), "the cat"]) == 2
    assert "model.norm.weight" in capsys.readouterr().err


def test_an_adapter_goes_on_with_a_text_where_peft_is_installed(trained, tmp_path, monkeypatch, capsys):
    run = trained(**FACTORS["switchlora"])
    assert export.main([str(run), str(tmp_path / "out"), "--adapter"]) == 0
    argv = ("the cat", "--greedy", "--max_new_tokens", "4")
    if importlib.util.find_spec("peft") is not None:
        assert said(str(tmp_path / "out"), *argv) == said(str(run), *argv)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert said(str(tmp_path / "out"), *argv)[0] == 2
    assert "is an adapter, and peft is not installed: pip install peft" in capsys.readouterr().err


def test_the_exports_tokenizer_is_the_prompts(trained, tmp_path):
    assert export.main([str(trained(**FACTORS["lora"])), str(tmp_path / "out"), "--adapter"]) == 0
    for folder in (tmp_path / "out", tmp_path / "out" / "base"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("the cat")["input_ids"] == tokenizer("the cat", add_special_tokens=False)["input_ids"]
        assert tokenizer.model_max_length == 64 and (folder / "tokenizer.model").is_file()
