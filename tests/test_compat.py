"""Run folders that older versions of this code wrote go on, bit by bit, as they would have gone on then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from compat.write_runs import LAST, METHODS, STOPPED, command, digest
from helpers import RESUME
from safetensors.torch import load_file

from peft_pretraining import export
from peft_pretraining.checkpoint import run_dir

RUNS = Path(__file__).parent / "compat" / "runs"
MODEL, DATA = RUNS / "llama.json", RUNS / "data"


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_commit_598c975_goes_on(tmp_path, method, capsys):
    """Where the processor computes other last bits than the one that wrote it, a run from the start is the measure."""
    run = Path(shutil.copytree(RUNS / method, tmp_path / "run"))
    argv = command(method, run, MODEL, DATA)
    assert helpers.run([*argv, *RESUME]) == 0
    err = capsys.readouterr().err
    assert f"{run / f'model_{STOPPED}'} has no run id (an older version wrote it): taken as one of this run" in err
    assert [item[0] for item in helpers.updates(run)] == list(range(1, LAST + 1))
    assert run_dir.read_run_config(run)["run"]["id"]  # from now on it has one
    assert run_dir.damage(run / f"model_{LAST}") is None
    if digest(run / f"model_{LAST}") == json.loads((RUNS / "digests.json").read_text())[method]:
        return
    anew = tmp_path / "anew"
    assert helpers.run(command(method, anew, MODEL, DATA)) == 0
    assert helpers.different_tensors(anew / f"model_{STOPPED}", RUNS / method / f"model_{STOPPED}") != [], (
        "this processor computes the same first half, and the stored run went on otherwise"
    )
    for name, expected in weights(anew / f"model_{LAST}").items():
        torch.testing.assert_close(weights(run / f"model_{LAST}")[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_it_is_lost_in_loading(tmp_path, method):
    """Saved again as it was loaded, it holds the same bits and counters, whatever the processor."""
    run, old = tmp_path / "run", RUNS / method / f"model_{STOPPED}"
    argv = command(method, run, MODEL, DATA, save_every=STOPPED, resume_from=old)
    from peft_pretraining.checkpoint import checkpointer

    restore = checkpointer.Checkpointer.restore

    def restored_and_saved(self, folder):
        state = restore(self, folder)
        run.mkdir()
        self.save(state, "")
        raise helpers.MachineGone

    with pytest.MonkeyPatch().context() as patch, pytest.raises(helpers.MachineGone):
        patch.setattr(checkpointer.Checkpointer, "restore", restored_and_saved)
        helpers.run(argv)
    assert helpers.different_tensors(run / f"model_{STOPPED}", old) == []
    before, after = (json.loads((path / "training_state.json").read_text()) for path in (old, run / f"model_{STOPPED}"))
    assert {name: after[name] for name in before} == before


def test_its_settings_for_an_export_are_those_beside_it():
    old = RUNS / "golore_adapter" / f"model_{STOPPED}"
    exported = export.merged_model(old, None).state_dict()
    for name, expected in weights(old).items():
        torch.testing.assert_close(exported[name], expected)


def test_without_its_settings_it_cannot_be_told_from_another_run(tmp_path, capsys):
    run = Path(shutil.copytree(RUNS / "galore", tmp_path / "run"))
    (run / "config.yaml").unlink()
    assert helpers.run([*command("galore", run, MODEL, DATA), *RESUME]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "config.yaml is missing or empty, and no checkpoint beside it says how it was trained" in error
    # By its own name, in a folder of its own, it may be used.
    argv = command("galore", tmp_path / "other", MODEL, DATA, resume_from=run / f"model_{STOPPED}")
    assert helpers.run(argv) == 0
    assert "does not say how it was trained (an older version wrote it)" in capsys.readouterr().err
