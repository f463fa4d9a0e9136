"""From any checkpoint of a run to the merged, plain Hugging Face LLaMA.

    python scripts/export_merged.py checkpoints/my_run/model_20000 my_model --dtype bfloat16

Every checkpoint holds such a model already, in the dtype that was trained. Here the frozen weights and factors of the
training state are merged anew, in float32 or better, and rounded once to the dtype that is asked for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))  # works from any folder, without installation

from peft_pretraining.checkpoint import run_dir  # noqa: E402
from peft_pretraining.flags import ConfigError, exit_with_problems  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a folder model_{update} of a run")
    parser.add_argument("out", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as trained)")
    arguments = parser.parse_args(argv)
    try:
        check(arguments.checkpoint, arguments.out)
        from peft_pretraining.export import export

        export(arguments.checkpoint, arguments.out, arguments.dtype)
    except ConfigError as error:
        return exit_with_problems(error)
    return 0


def check(checkpoint: Path, out: Path) -> None:
    """Raises `ConfigError` for a checkpoint that is damaged or a folder that is in use."""
    problems = []
    if reason := run_dir.damage(checkpoint):
        problems.append(f"{checkpoint}: {reason}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"{out}: exists and is not an empty folder")
    if problems:
        raise ConfigError(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
