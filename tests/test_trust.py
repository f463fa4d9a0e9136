"""A payload in every file that the project reads: none of it is run, and what comes of it is an exit code and a line.

Each folder is made once, whole; then one file after the other is replaced, the manifest is made to fit, and the command
that reads the folder is run on a copy. The payload makes a file. (docs/security.md)
"""

from __future__ import annotations

import functools
import gc
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from conftest import write_blocks, write_model
from finetune_helpers import glue_flags, write_llama, write_rows
from finetune_helpers import rows as glue_rows
from option_helpers import save_tiny_model, sentiment_rows

Command = Callable[[Path], list[Any]]
"""The command line that reads a folder."""


class Payload:
    """Makes the file `mark` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


class LegacyZip(io.BytesIO):
    """What `torch.save` writes of the payload, in either of its formats."""

    @classmethod
    def of(cls, mark: Path, zipped: bool) -> bytes:
        file = cls()
        torch.save({"weight": Payload(mark)}, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()


def payloads(mark: Path) -> dict[str, bytes]:
    """The payload in the formats that something might unpickle or construct."""
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    touch = f"touch {mark}"
    return {
        "pickle": pickle.dumps(Payload(mark)),
        "torch": LegacyZip.of(mark, True),
        "old torch": LegacyZip.of(mark, False),
        "numpy": objects.getvalue(),
        "yaml": f"settings: !!python/object/apply:os.system ['{touch}']\n".encode(),
        "gzip": gzip.compress(pickle.dumps(Payload(mark))),
    }


def seal(folder: Path) -> None:
    """Make every manifest under `folder` fit what lies beside it, as whoever sends a checkpoint can."""
    for manifest in folder.rglob("manifest.json"):
        try:
            content = json.loads(manifest.read_bytes())
        except ValueError:
            continue  # it holds the payload itself
        for name in content["files"]:
            sent = (manifest.parent / name).read_bytes()
            content["files"][name] = {"bytes": len(sent), "sha256": hashlib.sha256(sent).hexdigest()}
        manifest.write_text(json.dumps(content))


def outcome(main: Callable[[list[str]], int], argv: Iterable[Any], mark: Path, capfd) -> str | None:
    """What is wrong with how a command took a file, or None."""
    capfd.readouterr()
    try:
        code = main([str(part) for part in argv])
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        code = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    said = capfd.readouterr()
    if mark.exists():
        mark.unlink()
        return f"ran the payload, and ended with {code}"
    if code not in (0, 1, 2):
        return f"ended with {code}"
    if "Traceback" in said.err + said.out:
        return f"ended with {code} and a traceback"
    if code != 0 and not said.err.strip():
        return f"ended with {code} and said nothing"
    return None


def attack(
    made: Path,
    main: Callable[[list[str]], int],
    command: Command,
    kinds: Iterable[str],
    tmp_path: Path,
    capfd,
    files: Iterable[str] | None = None,
) -> dict[str, str]:
    """What is wrong, by file and kind of payload, after a payload was put into every file of the folder `made`."""
    mark, wrong = tmp_path / "EXECUTED", {}
    contents = payloads(mark)
    names = files or sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    assert names
    shutil.copytree(made, tmp_path / "sent")
    assert main([str(part) for part in command(tmp_path / "sent")]) == 0, capfd.readouterr().err  # as it is
    shutil.rmtree(tmp_path / "sent")
    shutil.rmtree(tmp_path / "mine", ignore_errors=True)
    for name in names:
        for kind in kinds:
            folder = tmp_path / "sent"
            shutil.copytree(made, folder)
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_bytes(contents[kind])
            seal(folder)
            if problem := outcome(main, command(folder), mark, capfd):
                wrong[f"{name} ({kind})"] = problem
            shutil.rmtree(folder)
            shutil.rmtree(tmp_path / "mine", ignore_errors=True)
    return wrong


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """`Trainer` collects garbage when it begins, which takes a second for all that has been imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pretrain(argv: list[str]) -> int:
    return helpers.run(argv)


def pretraining(data: Path, model: Path, save_dir: Path, **changes: Any) -> list[Any]:
    settings = {
        **{"model_config": model, "dataset_path": data, "save_dir": save_dir, "batch_size": 2, "total_batch_size": 2},
        **{"lr": 1e-2, "num_training_steps": 2, "warmup_steps": 0, "workers": 0, "eval_every": 10, "save_every": 2},
        **{"max_length": 16, "method": "galore", "rank": 4, "eval_tokens": 32},
        **changes,
    }
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A data folder and a model's shape."""
    folder = tmp_path_factory.mktemp("small")
    shape = write_model(folder / "llama.json", num_hidden_layers=1)
    return write_blocks(folder / "data", train=8, validation=4, block=16), shape


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    """The folder of a run of two updates."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert pretrain([str(part) for part in pretraining(*small, folder)]) == 0
    return folder


def checkpoint_files(finished: Path) -> list[str]:
    return sorted(
        path.relative_to(finished / "model_2").as_posix()
        for path in (finished / "model_2").rglob("*")
        if path.is_file()
    )


def test_a_pretraining_checkpoint(small, finished, tmp_path, capfd):
    def command(sent: Path) -> list[Any]:
        return pretraining(*small, tmp_path / "mine", num_training_steps=3, resume_from=sent / "model_2")

    files = [f"model_2/{name}" for name in checkpoint_files(finished)]
    assert "model_2/training_state/.metadata" in files and "model_2/training_state/__0_0.distcp" in files
    assert attack(finished, pretrain, command, ("pickle", "torch"), tmp_path, capfd, files) == {}


def test_a_run_folder(small, finished, tmp_path, capfd):
    def command(sent: Path) -> list[Any]:
        return pretraining(*small, sent, num_training_steps=3, autoresume=True)

    assert attack(finished, pretrain, command, ("pickle", "yaml"), tmp_path, capfd) == {}


def test_a_warm_start_and_a_model_folder(small, finished, tmp_path, capfd):
    model, reads = finished / "model_2", ("config.json", "generation_config.json", "model.safetensors")

    def warm(sent: Path) -> list[Any]:
        return pretraining(*small, tmp_path / "mine", warmed_up_model=sent, num_training_steps=3)

    def named(sent: Path) -> list[Any]:
        return pretraining(*small, tmp_path / "mine", model_name_or_path=sent, model_config=None)

    wrong = attack(model, pretrain, warm, ("pickle", "torch"), tmp_path, capfd, ("training_state.json", *reads))
    wrong |= attack(model, pretrain, named, ("torch",), tmp_path, capfd, reads)
    assert wrong == {}


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
def test_weights_in_the_old_format(small, finished, tmp_path, capfd, kind):
    """`pytorch_model.bin` is a pickle by design; transformers reads its tensors alone."""
    sent, mark = tmp_path / "sent", tmp_path / "EXECUTED"
    shutil.copytree(finished / "model_2", sent)
    (sent / "model.safetensors").unlink()
    (sent / "pytorch_model.bin").write_bytes(payloads(mark)[kind])
    argv = pretraining(*small, tmp_path / "mine", model_name_or_path=sent, model_config=None)
    assert outcome(pretrain, argv, mark, capfd) is None
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (sent / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert outcome(pretrain, argv, mark, capfd) is None


def test_an_export(finished, tmp_path, capfd):
    from scripts.export_merged import main

    def command(sent: Path) -> list[Any]:
        return [sent / "model_2", tmp_path / "mine"]

    files = ["config.yaml", *(f"model_2/{name}" for name in ("training_state/.metadata", "model.safetensors"))]
    assert attack(finished, main, command, ("pickle", "torch", "yaml"), tmp_path, capfd, files) == {}


def test_a_comparison_of_runs(finished, tmp_path, capfd):
    from peft_pretraining.report.compare import main

    files = ("config.yaml", "metrics.jsonl")
    assert attack(finished, main, lambda sent: [sent], ("pickle", "yaml"), tmp_path, capfd, files) == {}


def test_a_data_folder(small, tmp_path, capfd):
    data, shape = small

    def command(sent: Path) -> list[Any]:
        return pretraining(sent, shape, tmp_path / "mine")

    assert attack(data, pretrain, command, ("pickle",), tmp_path, capfd) == {}


def test_arrow_types_that_are_pickles(small, tmp_path, capfd):
    """Older versions of pyarrow unpickled the metadata of this extension type as they opened a file."""
    import pyarrow as pa

    mark, sent = tmp_path / "EXECUTED", tmp_path / "sent"
    shutil.copytree(small[0], sent)
    (file,) = (sent / "train").glob("*.arrow")
    with pa.ipc.open_stream(file.read_bytes()) as stream:
        table = stream.read_all()
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    extension[b"ARROW:extension:metadata"] = pickle.dumps(Payload(mark))
    schema = pa.schema([table.schema.field("input_ids").with_metadata(extension)])
    with pa.ipc.new_stream(file, schema) as out:
        out.write_table(pa.table({"input_ids": table["input_ids"].cast(schema.field(0).type)}, schema=schema))
    assert outcome(pretrain, pretraining(sent, small[1], tmp_path / "mine"), mark, capfd) is None


def test_a_training_configuration_and_a_model_json(small, tmp_path, capfd):
    mark = tmp_path / "EXECUTED"
    for kind in ("pickle", "yaml"):
        (tmp_path / "sent.yaml").write_bytes(payloads(mark)[kind])
        argv = pretraining(*small, tmp_path / "mine", training_config=tmp_path / "sent.yaml")
        assert outcome(pretrain, argv, mark, capfd) is None
        (tmp_path / "llama.json").write_bytes(payloads(mark)[kind])
        assert outcome(pretrain, pretraining(small[0], tmp_path / "llama.json", tmp_path / "mine"), mark, capfd) is None


def test_streamed_shards(small, tmp_path, capfd):
    from streaming_helpers import write_shards

    shards = write_shards(tmp_path / "made", train=(4, 4), validation=(4,))
    write_llama(tmp_path / "tokenizer")

    def command(sent: Path) -> list[Any]:
        changes = {"dataset_path": None, "base_dir": sent, "tokenizer": tmp_path / "tokenizer"}
        return pretraining(*small, tmp_path / "mine", **changes)

    assert attack(shards, pretrain, command, ("pickle", "gzip"), tmp_path, capfd) == {}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The same documents in every format that `pretokenize.py` reads."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"w{number} w3 w4 w5" for number in range(8)]
    for name in ("a.txt", "a.txt.gz"):
        with (gzip.open if name.endswith("gz") else open)(folder / name, "wt") as file:
            file.write("\n\n".join(texts))
    write_rows(folder / "a.jsonl", [{"text": text} for text in texts])
    Dataset.from_dict({"text": texts}).to_parquet(folder / "a.parquet")
    Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "saved"))
    return folder


def pretokenizing(dataset: Path, tokenizer: Path, save_dir: Path) -> list[Any]:
    flags = {"dataset": dataset, "tokenizer": tokenizer, "save_dir": save_dir, "sequence_length": 4, "num_cpu": 1}
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def test_a_corpus(corpus, tmp_path, capfd):
    import pretokenize

    write_llama(tmp_path / "tokenizer")

    def command(sent: Path, name: str) -> list[Any]:
        return pretokenizing(sent / name, tmp_path / "tokenizer", tmp_path / "mine")

    wrong = {}
    for name in ("a.txt", "a.txt.gz", "a.jsonl", "a.parquet"):
        kinds = ("gzip",) if name.endswith("gz") else ("pickle",)
        reads = functools.partial(command, name=name)
        wrong |= attack(corpus, pretokenize.main, reads, kinds, tmp_path, capfd, (name,))
    saved = sorted(path.relative_to(corpus).as_posix() for path in (corpus / "saved").iterdir())
    reads = functools.partial(command, name="saved")
    wrong |= attack(corpus, pretokenize.main, reads, ("pickle",), tmp_path, capfd, saved)
    assert wrong == {}


CODE = "import os\nos.system(\"touch '{mark}'\")\n"


@pytest.fixture
def answers_yes(monkeypatch):
    """Whoever sits at the terminal, or whatever is piped in, says yes to every question."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    yield asked
    assert asked == []


def with_code(folder: Path, mark: Path, **changes: dict[str, Any]) -> Path:
    """Add Python files to a folder, and to its JSON files what tells transformers to import them."""
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(mark=mark) + "def generate(model, **_):\n    return None\n")
    for name, keys in changes.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return folder


AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoModelForSequenceClassification": "code.Model",
    "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
}


def test_a_tokenizer_folder(corpus, tmp_path, capfd, answers_yes):
    import pretokenize

    made = tmp_path / "made"
    write_llama(made)

    def command(sent: Path) -> list[Any]:
        return pretokenizing(corpus / "a.jsonl", sent, tmp_path / "mine")

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
    assert attack(made, pretokenize.main, command, ("pickle",), tmp_path, capfd, files) == {}
    mark = tmp_path / "EXECUTED"
    changes = {"auto_map": AUTO_MAP, "chat_template": "{{ ''.__class__.__mro__ }}"}
    for names in ({"tokenizer_class": "Unknown"}, {}):
        with_code(made, mark, tokenizer_config={**changes, **names})
        assert outcome(pretokenize.main, command(made), mark, capfd) is None


def glue_command(model: Path, folder: Path, **changes: Any) -> list[str]:
    train = write_rows(folder / "train.json", glue_rows("sst2", 8))
    small = {
        **{"model_name_or_path": model, "train_file": train, "validation_file": train, "output_dir": folder / "mine"},
        **{"do_train": True, "max_steps": 1, "per_device_train_batch_size": 2, "max_length": 8, "disable_tqdm": True},
        **{"save_strategy": "no", "use_cpu": True, "learning_rate": 1e-3},
    }
    return glue_flags(**{**small, **changes})


def task_command(model: Path, folder: Path, **changes: Any) -> list[str]:
    rows = write_rows(folder / "rows.jsonl", sentiment_rows(8))
    small = {
        **{"model_name": model, "task_name": "SST2", "train_file": rows, "test_file": rows, "num_dev": 1, "lr": 1e-3},
        **{"output_dir": folder / "mine", "max_steps": 1, "save_strategy": "no", "disable_tqdm": True},
    }
    return glue_flags(**{**small, **changes})


@pytest.mark.parametrize("asked", [{"auto_map": AUTO_MAP}, {"auto_map": AUTO_MAP, "model_type": "other"}, {}])
def test_code_beside_a_model(small, tmp_path, capfd, answers_yes, asked):
    import run_glue
    import run_tasks

    mark, sent = tmp_path / "EXECUTED", save_tiny_model(tmp_path / "sent")
    with_code(sent, mark, config=asked, generation_config={"custom_generate": "custom_generate"})
    argv = pretraining(*small, tmp_path / "mine", model_name_or_path=sent, model_config=None)
    assert outcome(pretrain, argv, mark, capfd) is None
    assert outcome(run_glue.main, glue_command(sent, tmp_path), mark, capfd) is None
    shutil.rmtree(tmp_path / "mine", ignore_errors=True)
    assert outcome(run_tasks.main, task_command(sent, tmp_path), mark, capfd) is None


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_refused(tmp_path, capfd, key):
    """They are code. transformers fetches and runs them where the package `kernels` is installed."""
    import run_glue
    import run_tasks

    sent = with_code(save_tiny_model(tmp_path / "sent"), tmp_path / "EXECUTED", config={key: "someone/kernel"})
    assert run_glue.main(glue_command(sent, tmp_path)) == 2
    assert "someone/kernel: code of the hub is not run" in capfd.readouterr().err
    assert run_tasks.main(task_command(sent, tmp_path)) == 2
    assert "someone/kernel: code of the hub is not run" in capfd.readouterr().err


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> Path:
    """A model, rows, and a fine-tuning run of GoLore's adapters that was saved after its first update."""
    import run_glue

    folder = tmp_path_factory.mktemp("finetuned")
    write_llama(folder / "model")
    argv = glue_command(folder / "model", folder, **FINETUNING, output_dir=folder / "run")
    assert run_glue.main(argv) == 0
    return folder


FINETUNING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "lora_r": 2, "enable_golore": True}


def test_a_finetuning_folder(finetuned, tmp_path, capfd):
    import run_glue

    made = finetuned / "run"
    (first,) = made.glob("checkpoint-1")

    def command(sent: Path) -> list[Any]:
        shutil.rmtree(sent / "checkpoint-2")  # the run was stopped after the first update
        return glue_command(finetuned / "model", tmp_path, **FINETUNING, output_dir=sent)

    top = [path.name for path in made.iterdir() if path.is_file()]
    inner = [path.relative_to(made).as_posix() for path in first.iterdir() if path.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} <= {
        path.name for path in first.iterdir()
    }
    wrong = attack(made, run_glue.main, command, ("pickle",), tmp_path, capfd, sorted(inner + top))
    unpickled = [name for name in inner if name.endswith((".pt", ".pth", ".bin"))]
    wrong |= attack(made, run_glue.main, command, ("torch",), tmp_path, capfd, unpickled)
    assert wrong == {}


def test_task_files(finetuned, tmp_path, capfd):
    import run_glue
    import run_tasks

    mark = tmp_path / "EXECUTED"
    for name in ("rows.csv", "rows.tsv", "rows.json", "rows.jsonl"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(mark)))
        flags = {"train_file": tmp_path / name, "validation_file": tmp_path / name}
        assert outcome(run_glue.main, glue_command(finetuned / "model", tmp_path, **flags), mark, capfd) is None
    flags = {"train_file": tmp_path / "rows.csv", "test_file": tmp_path / "rows.csv"}
    assert outcome(run_tasks.main, task_command(finetuned / "model", tmp_path, **flags), mark, capfd) is None


def test_a_folder_of_data_with_a_script_is_not_imported(finetuned, corpus, tmp_path, capfd):
    """Older versions of `datasets` ran `NAME/NAME.py`."""
    import pretokenize

    mark, sent = tmp_path / "EXECUTED", tmp_path / "sent"
    shutil.copytree(corpus, sent)
    for folder in (sent, sent / "saved"):
        (folder / f"{folder.name}.py").write_text(CODE.format(mark=mark))
        argv = pretokenizing(folder, finetuned / "model", tmp_path / "mine")
        assert outcome(pretokenize.main, argv, mark, capfd) is None
