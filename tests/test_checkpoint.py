"""What a checkpoint holds, who can read it, which ones are kept, and what happens to damaged ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from conftest import BLOCK, VOCABULARY, write_blocks
from helpers import GALORE, METHODS, RESUME, stop_after
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from peft_pretraining.checkpoint import run_dir, writer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return helpers.Undisturbed(tmp_path_factory)


@pytest.fixture
def finished(command, undisturbed, tmp_path):
    """A copy, which may be damaged, of a finished GaLore run with checkpoints of updates 10 and 20."""
    return Path(shutil.copytree(undisturbed(command, **GALORE), tmp_path / "run"))


# What it holds.


def validation_rows(data_dir):
    import datasets

    return torch.tensor(datasets.load_from_disk(str(data_dir))["validation"]["input_ids"])


@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_it_and_gives_the_reported_loss(command, undisturbed, data_dir, method):
    from transformers import AutoModelForCausalLM

    folder = undisturbed(command, **METHODS[method])
    rows = validation_rows(data_dir)
    for update, reported in helpers.evaluations(folder)[1:]:
        model, info = AutoModelForCausalLM.from_pretrained(folder / f"model_{update}", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            loss = model(input_ids=rows, labels=rows).loss.item()
        assert loss == pytest.approx(reported, abs=1e-5)
    weights = helpers.tensors(folder / "model_20")  # the exported weights are those that are trained
    exported = {
        name.removeprefix("exported."): value for name, value in weights.items() if name.startswith("exported.")
    }
    assert set(exported) == set(model.state_dict())
    assert all(torch.equal(value, weights[f"model.{name}"]) for name, value in exported.items())


@pytest.mark.parametrize("method", METHODS)
def test_it_holds_tensors_and_json_only(command, undisturbed, method):
    folder = undisturbed(command, **METHODS[method]) / "model_20"
    stored = FileSystemReader(folder / "training_state").read_metadata().state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in stored.values())
    parameters = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    states = {name.removeprefix("optimizer.") for name in stored if name.startswith("optimizer.")}
    assert len(parameters) + len(states) == len(stored)
    assert all({f"{name}.exp_avg", f"{name}.exp_avg_sq", f"{name}.step"} <= states for name in parameters)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"),
        *("training_state.json", "training_state", "manifest.json"),
    }
    counters = helpers.counters(folder)
    statistics = counters.pop("spike_statistics")
    assert [numbers[2] for numbers in (statistics["loss"], statistics["gradient norm"])] == [20, 20]
    assert counters == {
        **{"skipped_spikes": 0, "spikes_in_a_row": 0, "data_state": {}},
        **{"update_step": 20, "tokens_seen": 20 * 8 * BLOCK, "data_position": 160, "skipped_updates": 0},
        **{"schedule_start": 0, "evaluated_step": 20, "world_size": 1, "method": {}},
        **{"format": 1, "nonfinite_in_a_row": 0, "empty_updates": 0, "rewinds": []},
    }


def test_moments_are_of_low_rank(command, undisturbed):
    state = helpers.tensors(undisturbed(command, **GALORE) / "model_20")
    name = "optimizer.model.layers.0.mlp.{}_proj.weight.{}"
    assert state[name.format("up", "exp_avg")].shape == (64, 4)  # a weight of (64, 32)
    assert state[name.format("up", "right_basis")].shape == (4, 32)
    assert state[name.format("down", "exp_avg")].shape == (4, 64)
    assert state[name.format("down", "left_basis")].shape == (32, 4)
    assert state["optimizer.model.embed_tokens.weight.exp_avg"].shape == (VOCABULARY, 32)


def test_bfloat16_is_restored_as_it_was(command, undisturbed, tmp_path):
    """No state is rounded to the weights' dtype on the way, and integers stay integers."""
    changes = {**GALORE, "dtype": "bf16", "num_training_steps": 8}
    stop_after(6, command(**changes))
    saved = helpers.tensors(tmp_path / "run" / "model_6")
    assert saved["model.lm_head.weight"].dtype == saved["exported.lm_head.weight"].dtype == torch.bfloat16
    assert saved["optimizer.model.layers.0.mlp.up_proj.weight.last_refresh"].dtype == torch.int64
    assert helpers.run([*command(**changes), *RESUME]) == 0
    helpers.assert_same_run(tmp_path / "run", undisturbed(command, **changes))


def word_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


@pytest.mark.parametrize("named", [False, True], ids=["of the data", "named"])
def test_the_tokenizer_is_saved_along(command, tmp_path, data_dir, named):
    from transformers import AutoTokenizer

    data, tokenizer = data_dir, tmp_path / "tokenizer"
    if named:
        word_tokenizer(tokenizer)
    else:
        data, tokenizer = write_blocks(tmp_path / "data"), None
        word_tokenizer(data)
    assert helpers.run(command(dataset_path=data, tokenizer=tokenizer, num_training_steps=2)) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "run" / "model_2")
    assert loaded("w3 w17 w99")["input_ids"] == [3, 17, 99]
    assert run_dir.damage(tmp_path / "run" / "model_2") is None  # its files are in the manifest, too
    assert "tokenizer.json" in json.loads((tmp_path / "run" / "model_2" / "manifest.json").read_text())["files"]


def test_a_tokenizer_that_cannot_be_loaded_is_no_reason_to_lose_the_weights(command, tmp_path, capsys):
    data = write_blocks(tmp_path / "data", tokenizer=str(tmp_path / "gone"))
    (data / "tokenizer_config.json").unlink()
    assert helpers.run(command(dataset_path=data, num_training_steps=2)) == 0
    assert capsys.readouterr().err.count("checkpoints will hold no tokenizer") == 1
    assert run_dir.damage(tmp_path / "run" / "model_2") is None


def test_every_file_has_the_permissions_of_the_user(command, tmp_path):
    before = os.umask(0o027)
    try:
        assert helpers.run(command(num_training_steps=2)) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run" / "model_2").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o640)}


# When it is written and how long it is kept.


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({"save_every": 8}, [8, 16, 20]),  # one follows the last update
        ({"save_every": 100}, [20]),
        ({"save_every": 4, "keep_checkpoints": 2}, [16, 20]),
        ({"save_every": 20, "num_extra_training_steps": 3}, [20, 23]),
    ],
)
def test_checkpoints_of_a_run(command, tmp_path, changes, kept):
    assert helpers.run(command(**changes)) == 0
    assert helpers.checkpoints(tmp_path / "run") == kept
    assert all(run_dir.damage(tmp_path / "run" / f"model_{update}") is None for update in kept)


def test_older_ones_go_only_when_a_newer_one_is_complete(command, tmp_path, monkeypatch):
    complete, seen = writer.complete, []

    def watched(temporary, final, files):
        seen.append(helpers.checkpoints(tmp_path / "run"))
        if final.name == "model_16":
            raise helpers.MachineGone
        complete(temporary, final, files)

    monkeypatch.setattr(writer, "complete", watched)
    with pytest.raises(helpers.MachineGone):
        helpers.run(command(save_every=4, keep_checkpoints=1))
    assert seen == [[], [4], [8], [12]]
    assert helpers.checkpoints(tmp_path / "run") == [12] and helpers.unfinished(tmp_path / "run") == ["model_16.tmp"]


def test_a_damaged_later_checkpoint_pushes_out_no_good_one(finished, command):
    helpers.truncate(finished / "model_20" / "model.safetensors")
    stop_after(15, [*command(**GALORE, keep_checkpoints=2), *RESUME])
    assert helpers.checkpoints(finished) == [10, 15, 20]
    assert run_dir.damage(finished / "model_10") is run_dir.damage(finished / "model_15") is None
    assert helpers.run([*command(**GALORE, keep_checkpoints=2), *RESUME]) == 0
    assert helpers.checkpoints(finished) == [15, 20]
    assert run_dir.damage(finished / "model_20") is None


def test_a_damaged_checkpoint_in_between_pushes_out_no_good_one(command, tmp_path):
    """The likeliest to be damaged is the one that was written in haste, on a signal."""
    argv = command(**GALORE, save_every=5, keep_checkpoints=2)
    stop_after(17, argv)
    assert helpers.checkpoints(tmp_path / "run") == [15, 17]
    helpers.truncate(tmp_path / "run" / "model_17" / "training_state" / "__0_0.distcp")
    assert helpers.run([*argv, *RESUME]) == 0
    assert helpers.checkpoints(tmp_path / "run") == [15, 20]
    assert run_dir.damage(tmp_path / "run" / "model_15") is run_dir.damage(tmp_path / "run" / "model_20") is None


# Damage.


def remove(path):
    path.unlink()


DAMAGES = {
    helpers.flip_byte: {"manifest.json": "", None: "is damaged (its checksum differs)"},
    helpers.truncate: {"manifest.json": "cannot be read", None: "is truncated or overgrown"},
    remove: {None: "is missing"},
}


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize(
    "name",
    [
        *("training_state/__0_0.distcp", "training_state/.metadata", "model.safetensors", "training_state.json"),
        *("manifest.json", "config.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(finished, command, undisturbed, capsys, name, harm):
    harm(finished / "model_20" / name)
    assert helpers.run([*command(**GALORE), *RESUME]) == 0
    err = capsys.readouterr().err.splitlines()
    (skipped,) = [line for line in err if "skipped checkpoint" in line]
    why = DAMAGES[harm].get(name, DAMAGES[harm][None])
    # A damaged manifest may accuse any file.
    where = "" if name == "manifest.json" else name
    assert f"WARNING skipped checkpoint {finished / 'model_20'}: {where}" in skipped and why in skipped
    assert sum(f"resuming from {finished / 'model_10'}" in line for line in err) == 1
    helpers.assert_same_run(finished, undisturbed(command, **GALORE))
    assert run_dir.damage(finished / "model_20") is None  # written anew over the damaged one


@pytest.mark.parametrize("bit", [0, 2, 5])
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path, bit):
    """Nor does one stop the search for a good checkpoint with an exception."""
    temporary, folder = tmp_path / "model_7.tmp", tmp_path / "model_7"
    (temporary / "training_state").mkdir(parents=True)
    tensors = ("training_state/.metadata", "training_state/__0_0.distcp", "model.safetensors")
    for name in ("training_state.json", "config.json", *tensors):
        (temporary / name).write_bytes(name.encode() * 7)
    writer.complete(temporary, folder, writer.seal(temporary, run_dir.checkpoint_files(temporary)))
    assert run_dir.newest_good_checkpoint(tmp_path) == (folder, [])
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        assert run_dir.damage(folder), f"byte {position}: {bytes(flipped)}"
    for content in ("", "[]", "null", '{"files": []}', '{"files": {"training_state.json": 3}}', '{"files": null}'):
        path.write_text(content)
        assert "manifest.json cannot be read" in run_dir.damage(folder), content


def test_a_file_that_the_disk_cannot_give_is_damaged(finished, monkeypatch):
    digest = run_dir.file_digest

    def failing(path):
        if path.name == "model.safetensors" and path.parent.name == "model_20":
            raise OSError(5, "Input/output error")
        return digest(path)

    monkeypatch.setattr(run_dir, "file_digest", failing)
    assert run_dir.newest_good_checkpoint(finished) == (
        finished / "model_10",
        [
            f"skipped checkpoint {finished / 'model_20'}: model.safetensors cannot be read "
            "([Errno 5] Input/output error)"
        ],
    )


def test_with_every_checkpoint_damaged_the_run_stops(finished, command, capsys):
    helpers.truncate(finished / "model_10" / "config.json")
    helpers.flip_byte(finished / "model_20" / "training_state" / "__0_0.distcp")
    before = helpers.contents(finished)
    assert helpers.run([*command(**GALORE), *RESUME]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 3
    assert "training_state/__0_0.distcp is damaged" in errors[0] and "config.json is truncated" in errors[1]
    assert "every checkpoint is damaged; --allow_restart True starts over" in errors[2]
    assert helpers.contents(finished) == before


def test_allow_restart_begins_again_over_damaged_checkpoints(finished, command, undisturbed):
    for update in (10, 20):
        helpers.flip_byte(finished / f"model_{update}" / "manifest.json")
    assert helpers.run([*command(**GALORE), *RESUME, "--allow_restart", "True"]) == 0
    helpers.assert_same_run(finished, undisturbed(command, **GALORE))
    assert run_dir.damage(finished / "model_10") is run_dir.damage(finished / "model_20") is None


def test_allow_restart_still_prefers_a_good_checkpoint(finished, command, capsys):
    helpers.flip_byte(finished / "model_20" / "model.safetensors")
    assert helpers.run([*command(**GALORE), *RESUME, "--allow_restart", "True"]) == 0
    assert f"resuming from {finished / 'model_10'}" in capsys.readouterr().err
