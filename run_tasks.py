"""Fine-tune a causal language model on an option task, or test it in context: `python run_tasks.py ...`.

Under torchrun the batches are divided over the processes. The same command goes on from the newest checkpoint in
--output_dir. Exit codes: 0 finished; 2 bad input (one line per problem on stderr); 1 anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from peft_pretraining.finetune.options.settings import DEFAULTS, DESCRIPTION, OptionSettings, check
from peft_pretraining.finetune.settings import load
from peft_pretraining.flags import EXIT_BAD_INPUT, ConfigError, exit_with_problems


def main(argv: Sequence[str] | None = None) -> int:
    try:
        finetuning = load(
            sys.argv[1:] if argv is None else argv,
            OptionSettings,
            prog="run_tasks.py",
            description=DESCRIPTION,
            defaults=DEFAULTS,
            check_task=check,
        )
        from peft_pretraining.finetune.options.run import run  # heavy imports wait until the flags are known to be good

        run(finetuning)
    except ConfigError as error:
        # Every process finds the same problems: one per machine speaks.
        return exit_with_problems(error) if os.environ.get("LOCAL_RANK", "0") == "0" else EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
