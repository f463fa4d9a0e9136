"""Pre-train a LLaMA with any of the methods: `torchrun torchrun_main.py ...`, or `python torchrun_main.py ...`.

Exit codes: 0 finished; 2 bad input (one line per problem on stderr, nothing written); 75 stopped by SIGTERM, SIGUSR1,
SIGHUP or Ctrl-C after saving, to be launched again; 130 aborted by a second Ctrl-C; 1 anything else, a last state that
could not be saved among it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_pretraining.runtime.launcher import bad_input, check_launcher
from peft_pretraining.runtime.signals import run_script


def main(argv: Sequence[str] | None = None) -> int:
    from peft_pretraining.flags import ConfigError  # imports wait until signals are answered

    try:
        check_launcher()
        from peft_pretraining.config import cli

        launch = cli.load(sys.argv[1:] if argv is None else argv)
        # Heavy imports wait until the input is known to be good.
        from peft_pretraining.runtime.watchdog import Watchdog
        from peft_pretraining.training.build import run

        settings = launch.config.run
        with Watchdog(settings.step_timeout, Path(settings.save_dir or "."), int(os.environ.get("RANK", "0"))):
            return run(launch)
    except ConfigError as error:
        return bad_input(error)


def script() -> int:
    """The whole life of a process of the command that an installation has."""
    return run_script(main)


if __name__ == "__main__":
    sys.exit(run_script(main))
