"""From any checkpoint of a run to what other programs load: the merged, plain LLaMA, or an adapter for PEFT.

    python -m peft_pretraining.export checkpoints/my_run/model_20000 my_model --dtype bfloat16
    python -m peft_pretraining.export checkpoints/my_lora_run my_adapter --adapter

Every checkpoint holds such a model already, in the dtype that was trained. Here the frozen weights and factors of the
training state are merged anew, in float32 or better, and rounded once to the dtype that is asked for; a model card says
how it was trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_pretraining.checkpoint import run_dir
from peft_pretraining.flags import ConfigError, completion, exit_with_problems, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16", "float64")


def merged_model(checkpoint: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """`exporting.trained.merged_model`."""
    from peft_pretraining.exporting import trained

    return trained.merged_model(checkpoint, dtype)


def export(checkpoint: Path, out: Path, dtype: str | None, as_adapter: bool = False, licence: str = "unknown") -> None:
    """`exporting.folder.export`."""
    from transformers.utils.logging import disable_progress_bar

    from peft_pretraining.exporting import folder

    disable_progress_bar()
    folder.export(checkpoint, out, dtype, as_adapter, licence)


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a folder model_{update} of a run, or a run's: its newest")
    parser.add_argument("out", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as trained)")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the factors of a method that has some (lora, relora, switchlora, golore_adapter) as an adapter for "
        "PEFT, and the model below them to OUT/base",
    )
    parser.add_argument("--license", default="unknown", metavar="ID", help="for the model card, as the hub spells it")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m peft_pretraining.export") -> int:
    command = parser(prog)
    completion.offer(command)
    arguments = command.parse_args(argv)
    try:
        checkpoint = checked(arguments.checkpoint, arguments.out)
        export(checkpoint, arguments.out, arguments.dtype, arguments.adapter, arguments.license)
    except ConfigError as error:
        return exit_with_problems(error)
    print(arguments.out)
    return 0


def checked(path: Path, out: Path | None = None) -> Path:
    """Returns the checkpoint at `path`, which may be a run's folder.

    Raises `ConfigError` for a checkpoint that is damaged and for a folder `out` that is in use.
    """
    problems = []
    checkpoint, skipped = newest(path)
    if checkpoint is None:
        problems += skipped
    elif reason := run_dir.damage(checkpoint):
        problems.append(f"{checkpoint}: {reason}")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"{out}: exists and is not an empty folder")
    if problems or checkpoint is None:
        raise ConfigError(problems)
    for line in skipped:
        print(f"warning: {one_line(line)}", file=sys.stderr)
    return checkpoint


def newest(path: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint of a run's folder, and why newer ones were skipped; any other path as it is."""
    if not run_dir.completed_checkpoints(path):
        return path, []
    return run_dir.newest_good_checkpoint(path)


if __name__ == "__main__":
    sys.exit(main())
