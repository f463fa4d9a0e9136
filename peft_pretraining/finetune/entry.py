"""What the fine-tuning entry points share: from a command line to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from peft_pretraining.flags import ConfigError
from peft_pretraining.launcher import bad_input, check_launcher
from peft_pretraining.signals import EXIT_REQUEUE, Stopped


def run_entry(run: Callable[[Sequence[str]], Any], argv: Sequence[str] | None) -> int:
    """Call `run` with the command line; 0, 2 for bad input with one line per problem on stderr, or 75 when it was asked
    to stop and has saved."""
    try:
        check_launcher()
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except ConfigError as error:
        return bad_input(error)
    except Stopped:
        return EXIT_REQUEUE
    finally:
        leave_process_group()


def leave_process_group() -> None:
    """A process that ends within its group may be aborted by the group's own threads."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
