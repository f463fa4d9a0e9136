"""How a study starts a training script."""

from __future__ import annotations

import sys

from _study import PROJECT


def launcher(processes: int, script: str) -> list[str]:
    """The words before a training script's flags: one process, or `processes` of one machine by torchrun.

    Under torchrun each run has a port of its own, so that several may run at a time.
    """
    path = str(PROJECT / script)
    if not processes:
        return [sys.executable, path]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", path]
