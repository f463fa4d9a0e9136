"""torchrun, with its own arguments, that ends as its processes do: `peft-torchrun --standalone --nproc_per_node 8 ...`.

torchrun ends with 1 and its own traceback whatever a process ended with. This is the same launcher with the exit code
of the first process that failed: 2 for bad input, of which one process per machine has said what it is, 75 for a run
that was stopped and has saved, 1 for anything else, 128 + n for a process that signal n has killed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from peft_pretraining.flags import EXIT_BAD_INPUT, ConfigError, exit_with_problems
from peft_pretraining.runtime.signals import EXIT_REQUEUE

_SPEAK_FOR_THEMSELVES = (EXIT_BAD_INPUT, EXIT_REQUEUE)
"""Exit codes of processes that have said all there is to say."""


def main(argv: Sequence[str] | None = None) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # It logs each process that failed, which is said here once.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:] if argv is None else list(argv)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        if code not in _SPEAK_FOR_THEMSELVES:
            what = f"signal {-code} killed it" if code < 0 else f"exit code {code}"
            print(f"error: process rank {rank} failed ({what})", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    except ValueError as error:
        return exit_with_problems(ConfigError([f"torchrun: {error}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
