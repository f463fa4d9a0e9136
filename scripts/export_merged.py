"""From any checkpoint of a run to the merged, plain Hugging Face LLaMA: `python -m peft_pretraining.export`, from any
folder and without installation.

    python scripts/export_merged.py checkpoints/my_run/model_20000 my_model --dtype bfloat16
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from any folder, without installation

from peft_pretraining import export


def main(argv: list[str]) -> int:
    return export.main(argv, "export_merged.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
