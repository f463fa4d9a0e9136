"""Compare runs, from any folder and without installation: see `peft_pretraining/report/compare.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_pretraining.report.compare import main

if __name__ == "__main__":
    sys.exit(main())
