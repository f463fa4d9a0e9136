"""Is this machine all right? Tries on its GPU what training needs: eight minutes on one H100, without a network.

    python scripts/check_gpu.py                        # the table on the terminal, and check_gpu.json
    python scripts/check_gpu.py --only parity,resume   # some steps
    python scripts/check_gpu.py --device cpu --quick   # the same code with tiny shapes, where there is no GPU

Every line says what must hold, what was seen and the limit. What this version or this machine does not have is "not
available". Exit codes: 0 all lines hold; 1 some do not, which are named at the end; 2 bad input, or no GPU that can be
used. docs/performance.md explains the lines.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from _check_gpu.plan import STEPS

_NAMES = list(dict.fromkeys(step.name for step in STEPS))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the code, not the machine")
    parser.add_argument("--only", metavar="STEP,...", help=f"of {', '.join(_NAMES)}")
    parser.add_argument("--json", default="check_gpu.json", metavar="FILE", help="where the lines go, too")
    parser.add_argument("--minutes", type=float, default=8.0, help="after so many, what is left counts as failed")
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",") if arguments.only else _NAMES
    if unknown := [name for name in chosen if name not in _NAMES]:
        parser.error(f"--only {','.join(unknown)}: there is {', '.join(_NAMES)}")
    if not Path(arguments.json).resolve().parent.is_dir():
        parser.error(f"--json {arguments.json}: no such folder")

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # a scheduler's; the steps make their own groups
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "disabled"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve other processes
    os.environ.setdefault("OMP_NUM_THREADS", "1" if arguments.quick else "4")
    # Asking for devices must not make a context here: the steps run in forks, which could not use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from _check_gpu.driver import run  # heavy

    return run(arguments.device, arguments.quick, chosen, Path(arguments.json), arguments.minutes * 60)


if __name__ == "__main__":
    sys.exit(main())
