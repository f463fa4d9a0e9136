"""Memory, launches and waits of a dozen settings on a GPU that is simulated: what costs more than it did fails here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import footprint
import pytest

SAID = json.loads(footprint.EXPECTED.read_text())
TOLERANCE_MIB = 2.0
TOLERANCE_LAUNCHES = 0.02
WHAT_TO_DO = (
    "If that is what you want, `python tests/footprint.py` shows all differences, and `--write` takes them; otherwise "
    "look at `Measured.held` (what is live at the peak) and `Measured.counts` (waits with their place in the code)."
)


@pytest.mark.parametrize("name", footprint.SETTINGS)
def test_a_setting_costs_what_it_did(name):
    measured = footprint.measure(name)
    assert measured.keys() == SAID["cases"][name].keys()
    for kind, now in measured.items():
        before, which = SAID["cases"][name][kind], f"{name}: in the {kind} update"
        more = now["peak_mib"] - before["peak_mib"]
        assert abs(more) <= TOLERANCE_MIB, (
            f"{which}, the peak is {now['peak_mib']:g} MiB, {more:+.1f} MiB. {WHAT_TO_DO}"
        )
        assert now["exchanged"] == before["exchanged"], f"{which}, other bytes are exchanged. {WHAT_TO_DO}"
        if SAID["versions"] != footprint.versions():
            continue  # other versions of the libraries have other operators
        assert now["waits"] == before["waits"], (
            f"{which}, the host waits {now['waits']} times for the device instead of {before['waits']}. {WHAT_TO_DO}"
        )
        assert abs(now["launches"] / before["launches"] - 1) <= TOLERANCE_LAUNCHES, (
            f"{which}, {now['launches']} kernels are launched instead of {before['launches']}. {WHAT_TO_DO}"
        )


def test_every_setting_is_written_down():
    assert SAID["cases"].keys() == footprint.SETTINGS.keys()


def test_a_gradient_that_is_kept_and_a_wait_are_seen(monkeypatch):
    """The test above can fail: a copy of every gradient of a matrix, and a look at the loss."""
    from peft_pretraining.training import loop

    real, kept = loop.forward_backward, []

    def wasteful(run, micro_batches):
        sums = real(run, micro_batches)
        kept.extend(param.grad.clone() for param in run.model.parameters() if param.ndim == 2)
        float(sums[0])
        return sums

    monkeypatch.setattr(loop, "forward_backward", wasteful)
    name = "full_rank bf16"
    measured = footprint.measure(name)["ordinary"]
    matrices = 2 * (2 * 32000 * 512 + 2 * (4 * 512 * 512 + 3 * 512 * 1376))
    assert measured["waits"] == SAID["cases"][name]["ordinary"]["waits"] + 1
    more = measured["peak_mib"] - SAID["cases"][name]["ordinary"]["peak_mib"]
    assert more == pytest.approx(matrices / footprint.MIB, abs=0.1)  # those of the first update, at the second's peak


def test_a_simulation_leaves_torch_as_it_is():
    """In a process of its own: torch collects what `with torch.device` changes at its first use."""
    code = (
        "import footprint, torch\n"
        "footprint.measure('full_rank bf16')\n"
        "with torch.device('meta'):\n"
        "    assert torch.tensor([]).device.type == 'meta'\n"
    )
    tests = str(footprint.EXPECTED.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, str(footprint.EXPECTED.parents[1])])}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tests, check=True, timeout=240)
