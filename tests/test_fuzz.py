"""Whatever is given is taken, or refused in lines: never a traceback, a hang, or a gigabyte of memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
from fuzzing import damaged_bytes, damaged_json, examples, hostile_text, refused_or_taken
from hypothesis import given
from hypothesis import strategies as st

import torchrun_main
from peft_pretraining.checkpoint import metrics_file, run_dir
from peft_pretraining.config import cli
from peft_pretraining.data import shards
from peft_pretraining.flags import ConfigError
from peft_pretraining.models import model_config
from peft_pretraining.report import compare, finding, page
from peft_pretraining.report.grouping import grouped

MODEL = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 32},
    **{"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu"},
    **{"tie_word_embeddings": False, "attention_bias": False, "pad_token_id": -1, "bos_token_id": 1},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SPELLINGS = [spelling for flag in cli.all_flags() for spelling in flag.accepted]
GOOD_VALUES = ["1", "4", "0.5", "100", "True", "False", "galore", "lora", "cosine", "sgd", "galore_adamw", "float32"]
YAML = """# settings
lr: 4e-4
lora_r: 16
tags: [a, b]
autoresume: yes
max_train_tokens: 1.5B
comment: "a: b"
scheduler: &name linear
name: *name
"""
METRICS = (
    b"".join(
        json.dumps({"update_step": step, "loss": 5.0 / step, "tokens_seen": 64 * step, "step_time": 0.1}).encode()
        + b"\n"
        for step in (1, 2, 3)
    )
    + b'{"update_step": 3, "tokens_seen": 192, "final_eval_loss": 4.0, "final_eval_perplexity": 54.6}\n'
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, data_dir, model_json):
    """Flags of a run that would be started, in a folder that is never made."""
    folder = tmp_path_factory.mktemp("fuzz")
    flags = ["--model_config", model_json, "--dataset_path", data_dir, "--save_dir", folder / "run"]
    return [*map(str, flags), *"--batch_size 4 --num_training_steps 20 --warmup_steps 2".split()]


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """Relative paths that are made up must not be the project's."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


def quietly(act, *arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        return act(*arguments), errors.getvalue()


# Command lines

value = st.sampled_from(GOOD_VALUES) | hostile_text.map(lambda text: text.replace("\0", ""))


@st.composite
def words(draw):
    found = []
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(SPELLINGS) | st.sampled_from(["help", "lrr", "", "-", "epochs", "x\ny", "\udcff"]))
        given = draw(value)
        found += draw(
            st.sampled_from(([f"--{name}", given], [f"--{name}={given}"], [f"--{name}"], [f"-{name}", given], [given]))
        )
    return found


@examples(400)
@given(words())
def test_command_lines(base, words):
    launch, _ = quietly(refused_or_taken, cli.load, [*base, *words], {})
    if launch is not None:
        assert all("\n" not in warning for warning in launch.warnings)
        json.dumps(launch.config.settings())


@examples(60)
@given(words())
def test_command_lines_as_a_whole(base, words):
    def main():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("peft_pretraining.training.build.run", lambda launch: 0)
            return torchrun_main.main([*base, *words])

    code, errors = quietly(refused_or_taken, main)
    assert code in (None, 0, 2)
    assert "Traceback" not in errors
    if code == 2:
        assert all(line.startswith("error: ") for line in errors.split("\n")[:-1])


@examples(40)
@given(st.dictionaries(st.sampled_from(["WORLD_SIZE"]), hostile_text))
def test_launchers_environments(base, environment):
    refused_or_taken(cli.load, base, environment)


# Settings in files


@examples(250)
@given(damaged_bytes(YAML.encode()))
def test_yaml_files(base, tmp_path, content):
    (tmp_path / "settings.yaml").write_bytes(content)
    refused_or_taken(cli.load, [*base, "--training_config", str(tmp_path / "settings.yaml")], {})


@examples(150)
@given(damaged_json(MODEL))
def test_model_files(base, tmp_path, content):
    (tmp_path / "model.json").write_bytes(content)
    refused_or_taken(cli.load, [*base, "--model_config", str(tmp_path / "model.json")], {})
    problems = []
    settings = model_config.read_model_json(str(tmp_path / "model.json"), "--model_config", problems)
    assert (settings is None) == bool(problems)


@examples(60)
@given(damaged_json(MODEL))
def test_models_that_are_taken_can_be_built(base, tmp_path, content):
    import torch

    from peft_pretraining.models.llama import build_model

    (tmp_path / "model.json").write_bytes(content)
    launch = refused_or_taken(cli.load, [*base, "--model_config", str(tmp_path / "model.json")], {})
    if launch is None or model_config.parameter_count(launch.facts.model) > 10**7:
        return
    if launch.facts.model.get("num_hidden_layers", 32) < 100:
        refused_or_taken(build_model, launch.config.model, launch.facts.model, None, torch.device("meta"))


DATA_ARGS = {"sequence_length": 64, "vocab_size": 128, "largest_token_id": 127, "tokenizer": "t5-base", "train": 200}
SPLITS = {"splits": ["train", "validation"]}


@examples(100)
@given(damaged_json(DATA_ARGS), damaged_json(SPLITS))
def test_descriptions_of_data_folders(base, tmp_path, args, splits):
    (tmp_path / "args.json").write_bytes(args)
    (tmp_path / "dataset_dict.json").write_bytes(splits)
    refused_or_taken(cli.load, [*base, "--dataset_path", str(tmp_path)], {})


# Folders of runs


def run_folder(folder: Path) -> Path:
    checkpoint = folder / "model_3"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "training_state.json").write_text('{"update_step": 3}')
    files = {name: run_dir.file_digest(checkpoint / name) for name in ("training_state.json",)}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    return checkpoint


@examples(150)
@given(damaged_json({"files": {"training_state.json": {"bytes": 18, "sha256": "0" * 64}}, "update_step": 3}))
def test_manifests(tmp_path, content):
    checkpoint = run_folder(tmp_path)
    (checkpoint / "manifest.json").write_bytes(content)
    reason = refused_or_taken(run_dir.damage, checkpoint)
    assert reason is None or (reason and "\n" not in reason)
    good, skipped = refused_or_taken(run_dir.newest_good_checkpoint, tmp_path)
    assert (good is None) == bool(skipped)


CONFIG = (
    "settings:\n  method: full_rank\n  lr: 0.1\nidentity:\n  method: full_rank\n  rank: null\nversions: {torch: '2'}\n"
)


@examples(100)
@given(damaged_bytes(CONFIG.encode()))
def test_configurations_of_runs(base, tmp_path, content):
    run_folder(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "metrics.jsonl").write_bytes(METRICS)
    refused_or_taken(cli.load, [*base, "--save_dir", str(tmp_path), "--autoresume", "True"], {})
    code, errors = quietly(compare.main, [str(tmp_path)])
    assert code in (0, 2) and (code == 0 or errors.count("\n") == 1), errors
    if code == 0:
        page_of(tmp_path)


@examples(150)
@given(damaged_bytes(METRICS))
def test_metrics(tmp_path, content):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    records, problems = refused_or_taken(metrics_file.read_records, tmp_path / "metrics.jsonl")
    assert all(isinstance(record["update_step"], int) for record in records)
    assert all("\n" not in problem for problem in problems)
    code, errors = quietly(compare.main, [str(tmp_path), "--json", str(tmp_path / "rows.json")])
    assert code in (0, 2) and errors.count("\n") <= 1 + (code == 2), errors
    if code == 0:
        json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)
        page_of(tmp_path)


def page_of(folder):
    """A report of it, whose data are valid JSON."""
    text = page.build(grouped(finding.find([folder], [])), "title", "today")
    json.loads(text.partition('id="data">')[2].partition("</script>")[0], parse_constant=pytest.fail)


# Data

DOCUMENTS = b"".join(json.dumps({"text": f"document {i}", "url": "x"}).encode() + b"\n" for i in range(3))
TEXT_ROWS = {
    "csv": b'sentence,label\n"one, two",0\nthree,1\n"a ""b""",0\nfour,1\n',
    "tsv": b'sentence\tlabel\none two\t0\nthree\t1\n"four\t0\nfive\t1\n',
    "jsonl": b"".join(json.dumps({"sentence": f"row {i}", "label": i % 2}).encode() + b"\n" for i in range(4)),
}
OPTION_ROWS = b"".join(
    json.dumps({"sentence": f"The _ is {i}.", "option1": "cat", "option2": "dog", "answer": str(1 + i % 2)}).encode()
    + b"\n" for i in range(4)
)  # fmt: skip


@examples(100)
@given(damaged_bytes(DOCUMENTS))
def test_documents(base, tmp_path, content):
    for old in tmp_path.glob("*.json"):
        old.unlink()
    (tmp_path / "c4-train.00000-of-00001.json").write_bytes(content)
    (tmp_path / "c4-validation.00000-of-00001.json").write_bytes(DOCUMENTS)
    problems, warnings = [], []
    refused_or_taken(shards.find_local_shards, str(tmp_path), "--base_dir", problems, warnings)
    for line in content.splitlines(keepends=True):
        text, reason = refused_or_taken(shards.document_text, line)
        assert text is None or isinstance(text, str)
        assert (text is None) == bool(reason)


@pytest.mark.parametrize("kind", TEXT_ROWS)
def test_rows_of_glue_tasks(tmp_path, kind):
    from peft_pretraining.finetune.glue_data import load_rows
    from peft_pretraining.finetune.glue_settings import GlueSettings

    path = tmp_path / f"rows.{kind}"

    @examples(60)
    @given(damaged_bytes(TEXT_ROWS[kind]))
    def check(content):
        path.write_bytes(content)
        found = refused_or_taken(load_rows, GlueSettings(train_file=str(path)))
        if found is not None:
            task, splits = found
            assert all(isinstance(row[name], str) for row in splits["train"] for name in task.columns)

    check()


@examples(100)
@given(damaged_bytes(OPTION_ROWS))
def test_rows_of_option_tasks(tmp_path, content):
    from peft_pretraining.finetune.options.examples import load_splits
    from peft_pretraining.finetune.options.settings import OptionSettings
    from peft_pretraining.finetune.options.tasks import TASKS

    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    refused_or_taken(load_splits, TASKS["WinoGrande"], OptionSettings(train_file=str(path), trainer="none"))


# What the checks themselves are worth


def test_the_checks_catch_what_they_are_for():
    def grow():
        return bytearray(2 << 30)

    with pytest.raises(MemoryError):
        refused_or_taken(grow)
    with pytest.raises(KeyError):
        refused_or_taken({}.__getitem__, "x")
    with pytest.raises(AssertionError):
        refused_or_taken(lambda: (_ for _ in ()).throw(ConfigError([])).__next__())
    with pytest.raises(AssertionError):
        refused_or_taken(lambda: (_ for _ in ()).throw(SystemExit(1)).__next__())
