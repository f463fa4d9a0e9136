"""Fine-tune a causal language model on an option task, or test it in context: `python run_tasks.py ...` or torchrun.

The same command again goes on from the newest checkpoint in --output_dir.
Exit codes: 0 finished; 2 bad input (one line per problem on stderr); 75 stopped by SIGTERM, SIGUSR1,
SIGHUP or Ctrl-C after saving, to be launched again; 130 aborted by a second Ctrl-C; 1 anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft_pretraining.finetune.entry import run_entry
from peft_pretraining.runtime.signals import run_script


def _run(argv: Sequence[str]) -> None:
    # Here, where what is wrong with a method's folder becomes one line.
    from peft_pretraining.data.hub import work_offline_if_unreachable
    from peft_pretraining.finetune.options.settings import ENTRY, hub_names
    from peft_pretraining.finetune.settings import check

    task = check(argv, ENTRY).task  # before torch and transformers are imported, which takes seconds
    if hub_names(task):
        work_offline_if_unreachable()
    from peft_pretraining.finetune.options import run

    run.run(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return run_entry(_run, argv)


def script() -> int:
    """The whole life of a process of the command that an installation has."""
    return run_script(main)


if __name__ == "__main__":
    sys.exit(run_script(main))
