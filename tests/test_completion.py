"""Completion of command lines: what the shell gets when it asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

pytest.importorskip("argcomplete", reason="argcomplete is not installed: pip install -e '.[dev]'")


@pytest.mark.parametrize(
    ("script", "line", "proposed"),
    [
        ("torchrun_main.py", "--method ga", {"galore"}),
        ("torchrun_main.py", "--method switchlora --switch_lora_i", {"--switch_lora_interval"}),
        pytest.param("torchrun_main.py", "--scheduler cosine_w", {"cosine_with_min_lr"}, marks=pytest.mark.slow),
        pytest.param("pretokenize.py", "--overwrite T", {"True"}, marks=pytest.mark.slow),
        ("scripts/launch.py", "60m sw", {"switchlora"}),
        ("scripts/export_merged.py", "a b --ad", {"--adapter"}),
    ],
)
def test_the_shell_gets_flags_and_values(script, line, proposed, tmp_path):
    line = f"command {line}"
    asks = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asks["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "answer")
    command = [sys.executable, str(helpers.PROJECT / script)]
    done = subprocess.run(command, env=os.environ | asks, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {answer.strip() for answer in (tmp_path / "answer").read_text().split("\n")} == proposed


def test_the_shell_is_told_which_command_completes():
    program = Path(sys.executable).parent / "register-python-argcomplete"
    script = f'eval "$({program} peft-pretrain)" && complete -p peft-pretrain'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "argcomplete" in done.stdout, done.stderr
