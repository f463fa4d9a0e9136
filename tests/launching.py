"""Making many small runs by several processes with one launch: starting a process costs more than a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers


def launch(folder: Path, processes: int, cases: Sequence[dict[str, Any]], timeout: float = 500) -> str:
    """Run `helpers.py` under torchrun on the cases, in a new folder; what was written to stderr."""
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(list(cases)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launched = subprocess.run(
        [*torchrun, helpers.__file__, str(folder / "cases.json")],
        env=helpers.child_environment(),
        cwd=helpers.PROJECT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert launched.returncode == 0, helpers.last_words(launched.stderr)
    return launched.stderr
