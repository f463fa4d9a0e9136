"""What the fine-tuning entry points share: from a command line to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from peft_pretraining.flags import ConfigError
from peft_pretraining.runtime.launcher import bad_input, check_launcher
from peft_pretraining.runtime.signals import EXIT_REQUEUE, Stopped

EXIT_FAILED = 1


class RunFailed(RuntimeError):
    """A run that cannot go on; the message is one line that says why, and what to do."""


def run_entry(run: Callable[[Sequence[str]], Any], argv: Sequence[str] | None) -> int:
    """Call `run` with the command line. The exit code: 0, 2 for bad input with one line per problem on stderr, 75 when
    it was asked to stop and has saved, or 1 with one line for a run that failed."""
    try:
        check_launcher()
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except ConfigError as error:
        return bad_input(error)
    except Stopped:
        return EXIT_REQUEUE
    except OSError as error:  # a full disk, a folder that is gone
        return _failed(f"{error.filename or 'a file'}: {error.strerror or error}")
    except RunFailed as error:
        return _failed(str(error))
    finally:
        leave_process_group()


def _failed(why: str) -> int:
    print(f"error: {' '.join(why.split())}", file=sys.stderr)
    return EXIT_FAILED


def leave_process_group() -> None:
    """A process that ends within its group may be aborted by the group's own threads."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
