"""Pre-train a LLaMA with any of the methods: `torchrun torchrun_main.py ...`, or `python torchrun_main.py ...`.

Exit codes: 0 finished; 2 bad input (one line per problem on stderr, nothing written); 75 stopped by SIGTERM or SIGUSR1
after saving, to be launched again; 1 anything else, a last state that could not be saved among it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from peft_pretraining import cli
from peft_pretraining.flags import EXIT_BAD_INPUT, ConfigError, exit_with_problems

_SECONDS_TO_SPEAK = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    try:
        launch = cli.load(sys.argv[1:] if argv is None else argv)
        # Heavy imports wait until the input is known to be good.
        from peft_pretraining.build import run

        return run(launch)
    except ConfigError as error:
        # Every rank finds the same problems: one per machine speaks. torchrun kills the others when the first exits,
        # which must not be one that has said nothing.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            return exit_with_problems(error)
        time.sleep(_SECONDS_TO_SPEAK)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
